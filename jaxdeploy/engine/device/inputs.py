"""What a step takes from the host: one packed int32 array, and operands of the full sampler.

``StepFields`` declares the packed array once. Its total size, numpy views and jax slices follow from that.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np

from jaxdeploy.engine.checks import MAX_BIASES
from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.prompt_outputs import PromptOutputs

LAST_SAMPLE = 2
"""Value of ``StepFields.samples``: the drafts are known tokens, so only the sample after the last one counts."""

SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields that hold the bit patterns of float32 numbers."""

SETTINGS = ("prompt_length", "top_k", "seed", *SAMPLING_FLOATS)
"""Fields that are the same in all steps of a sequence."""

Array = np.ndarray[Any, np.dtype[np.int32]]

PerSequence = Annotated[Any, "sequences"]
PerDecode = Annotated[Any, "decodes"]
PerRow = Annotated[Any, "rows"]


class StepFields(NamedTuple):
    """The fields of the packed array, in order. The annotations name the attributes of ``StepShape`` that size them.

    Each field is int32. It is a view of a numpy array on the host, and a slice of a jax array in a step.
    """

    slot: PerSequence
    """Row of the token buffer."""
    prompt_length: PerSequence
    """Tokens of the prompt."""
    length: PerSequence
    """Tokens up to the end of this step: the position of the first new token."""
    samples: PerSequence
    """1 if the new tokens count, ``LAST_SAMPLE`` if only the last one does, 0 for padding and unfinished prompts."""
    last_token: PerSequence
    """Index in the step of the token whose logits are sampled from."""
    top_k: PerSequence
    seed: PerSequence
    temperature: PerSequence
    top_p: PerSequence
    min_p: PerSequence
    repetition_penalty: PerSequence
    presence_penalty: PerSequence
    frequency_penalty: PerSequence
    block_tables: Annotated[Any, "sequences", "table_length"]
    """Indices of the KV blocks of each sequence."""
    decode_lengths: PerDecode
    """1 plus the number of drafts of the row, or 0 for padding."""
    drafts: Annotated[Any, "decodes", "drafts"]
    """Tokens to verify."""
    row_sequence: PerRow
    """Sequence that a prefill row belongs to."""
    row_start: PerRow
    """Position of its first token."""
    row_tokens: PerRow
    """Tokens in it, 0 for padding."""
    adapter: Annotated[Any, "adapted_sequences"]
    """Slot of the adapter, -1 for none."""

    @classmethod
    def of(cls, packed: Any, shape: StepShape) -> StepFields:
        """Return the fields of a packed array: views of a numpy array, slices of a jax one."""
        return cls(*(packed[start:end].reshape(size) for start, end, size in _layout(shape)))

    @classmethod
    def sizes(cls, shape: StepShape) -> dict[str, tuple[int, ...]]:
        """Return the shape of every field by name."""
        return {name: tuple(getattr(shape, axis) for axis in axes) for name, axes in _AXES.items()}


_AXES: dict[str, tuple[str, ...]] = {
    name: hint.__metadata__ for name, hint in get_type_hints(StepFields, include_extras=True).items()
}


@functools.cache
def _layout(shape: StepShape) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Return start, end and shape of every field."""
    fields, start = [], 0
    for size in StepFields.sizes(shape).values():
        end = start + math.prod(size)
        fields.append((start, end, size))
        start = end
    return tuple(fields)


def packed_size(shape: StepShape) -> int:
    """Return the number of int32 in the packed array of ``shape``."""
    _, end, _ = _layout(shape)[-1]
    return end


class SamplingConstraints(NamedTuple):
    """What the full sampler needs for each row in addition to its fields: numpy arrays here, jax arrays in a step."""

    allowed: Any
    """uint32 [rows, ceil(V / 32)]: the bits of tokens that may be sampled are set."""
    bias: Any
    """int32 [rows, 2, MAX_BIASES]: tokens, and the bit patterns of the float32 added to their logits."""


@dataclass(frozen=True)
class ModelInputs:
    """One step as the device takes it."""

    shape: StepShape
    packed: Array
    """The ``StepFields``."""
    constraints: SamplingConstraints | None = None
    """Selects the full sampler. ``None``: the step takes the token with the largest logit."""
    prompt_outputs: PromptOutputs = PromptOutputs.NONE
    """What the step returns for its prompts."""


def padding_inputs(
    shape: StepShape, vocab_size: int, *, full_sampler: bool, prompt_outputs: PromptOutputs = PromptOutputs.NONE
) -> ModelInputs:
    """Return the inputs of a step that contains only padding, for warm-up."""
    constraints = no_constraints(shape, vocab_size) if full_sampler else None
    return ModelInputs(shape, np.zeros(packed_size(shape), np.int32), constraints, prompt_outputs)


def no_constraints(shape: StepShape, vocab_size: int) -> SamplingConstraints:
    """Return constraints that allow every token and add no bias."""
    allowed = np.full((shape.samples, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    return SamplingConstraints(allowed, no_bias(shape.samples))


@functools.cache
def no_bias(rows: int) -> Array:
    """Return a shared array of zeros [rows, 2, MAX_BIASES]; copy it before writing."""
    return np.zeros((rows, 2, MAX_BIASES), np.int32)
