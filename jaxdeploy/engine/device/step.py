"""One step as a pure function of arrays: embed tokens, run the layers, sample, write samples to the token buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.inputs import LAST_SAMPLE, SAMPLING_FLOATS, SETTINGS, SamplingConstraints, StepFields
from jaxdeploy.engine.device.prompt_rows import PromptRows, prompt_rows
from jaxdeploy.engine.device.sampler import Sampled, SamplingRows, greedy, sample
from jaxdeploy.engine.device.step_plan import StepPlan
from jaxdeploy.engine.device.step_weights import StepWeights, flatten
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.models.attention import PagedContext, Rows
from jaxdeploy.models.cache_layout import num_blocks
from jaxdeploy.models.eagle3 import put_features
from jaxdeploy.models.lora import AdapterBank
from jaxdeploy.models.model import Hidden, Model, Positions
from jaxdeploy.parallel.sharding import replicated


class DeviceState(NamedTuple):
    """What a step reads and writes on the device. A launch donates all of it and returns its successor.

    Attributes:
        pools: the KV pool of each layer.
        token_buffer: int32 [slots, L], the tokens of each running sequence. A step reads its inputs there and writes
            what it samples, so the next step needs no token from the host.
        features: [P, S, D], of a model with an EAGLE-3 head, and of the head.
    """

    pools: tuple[Any, ...]
    token_buffer: jax.Array
    features: jax.Array | None = None

    @classmethod
    def of(cls, pools: tuple[Any, ...], slots: int, session_len: int, mesh: Mesh) -> DeviceState:
        """Return a state with an empty token buffer for ``slots`` sequences of up to ``session_len`` tokens."""
        return cls(pools, jax.device_put(np.zeros((slots, session_len), np.int32), replicated(mesh)))


class StepArrays(NamedTuple):
    """What a step only reads on the device.

    Attributes:
        weights: of the model, as ``flatten`` returns them.
        fuse: [taps · D, D], the matrix that makes features; ``None`` if the model has no head.
        adapters: of the adapter bank; empty unless the step is adapted.
    """

    weights: tuple[jax.Array, ...]
    fuse: jax.Array | None = None
    adapters: tuple[jax.Array, ...] = ()


class StepInputs(NamedTuple):
    """What a step takes from the host.

    Attributes:
        fields: of its sequences and rows.
        constraints: select the full sampler; ``None`` takes the token with the largest logit.
        prompt_outputs: what the step returns for its prompts.
    """

    fields: StepFields
    constraints: SamplingConstraints | None
    prompt_outputs: PromptOutputs


class StepResult(NamedTuple):
    """What a step returns to the host.

    Attributes:
        sampled: tokens.
        prompts: of the prompts that it computes, if asked for.
    """

    sampled: Sampled
    prompts: PromptRows | None = None


@dataclass(frozen=True)
class StepModel:
    """A model inside a step.

    Attributes:
        model: on the arrays of the step.
        mesh: the devices.
        taps: the layers before which the residual stream is taken to make features.
        fuse: see ``StepArrays``.
        bank: ``None`` if no sequence of the step has an adapter.
        adapters: the arrays of the bank.
    """

    model: Model
    mesh: Mesh
    taps: tuple[int, ...] = ()
    fuse: jax.Array | None = None
    bank: AdapterBank | None = None
    adapters: tuple[jax.Array, ...] = ()

    def adapted(self, fields: StepFields, sequence: jax.Array, selected: jax.Array | None) -> Model:
        """Return the model with the adapter of each token, whose sequences are ``sequence`` int32 [T]."""
        if self.bank is None:
            return self.model
        return self.bank.adapted(self.model, self.adapters, fields.adapter[sequence], selected)

    def logits(self, hidden: jax.Array, slots: jax.Array | None) -> jax.Array:
        """Return logits float32 [T, V] of hidden states [T, D] with adapters in ``slots`` int32 [T], if any."""
        if self.bank is None or slots is None:
            return self.model.logits(hidden)
        return self.bank.logits(self.model, self.adapters, hidden, slots)


@dataclass(frozen=True)
class StepProgram:
    """What is static in all steps of a model.

    Attributes:
        weights: how to make the model from its arrays.
        plan: how steps are executed.
        bank: of adapters, if the engine has any.
        taps: see ``StepModel``.
    """

    weights: StepWeights
    plan: StepPlan
    bank: AdapterBank | None = None
    taps: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, model: Model, plan: StepPlan, bank: AdapterBank | None = None, taps: tuple[int, ...] = ()
    ) -> tuple[StepProgram, tuple[jax.Array, ...]]:
        """Return the program of ``model``, and its weights as ``StepArrays`` has them."""
        weights, arrays = flatten(model, plan.mesh)
        return cls(weights, plan, bank, taps), arrays

    def model(self, arrays: StepArrays, shape: StepShape) -> StepModel:
        """Return the model of a step of ``shape``."""
        bank = self.bank if shape.adapted else None
        return StepModel(
            self.weights.model(arrays.weights), self.plan.mesh, self.taps, arrays.fuse, bank, arrays.adapters
        )


def run_step(
    program: StepProgram,
    shape: StepShape,
    arrays: StepArrays,
    state: DeviceState,
    packed: jax.Array,
    constraints: SamplingConstraints | None = None,
    *,
    prompt_outputs: PromptOutputs = PromptOutputs.NONE,
) -> tuple[StepResult, DeviceState]:
    """Run ``step`` on flat arrays. This is the function that is compiled, with ``state`` donated."""
    inputs = StepInputs(StepFields.of(packed, shape), constraints, prompt_outputs)
    return step(program.model(arrays, shape), program.plan, shape, inputs, state)


def step(
    model: StepModel, plan: StepPlan, shape: StepShape, inputs: StepInputs, state: DeviceState
) -> tuple[StepResult, DeviceState]:
    """Run one step, or ``shape.repeats`` steps in a row, whose results are stacked."""
    if shape.repeats == 1:
        return _single_step(model, plan, shape, inputs, state)

    def repeat(index: jax.Array, state: DeviceState) -> tuple[StepResult, DeviceState]:
        fields = inputs.fields._replace(length=inputs.fields.length + index)
        return _single_step(model, plan, shape, inputs._replace(fields=fields), state)

    def body(carry: _Carry) -> _Carry:
        index, results, state = carry
        result, state = repeat(index, state)
        return index + 1, jax.tree.map(lambda stack, row: stack.at[index].set(row), results, result), state

    result, _ = jax.eval_shape(repeat, jnp.int32(0), state)
    empty = jax.tree.map(lambda row: jnp.zeros((shape.repeats, *row.shape), row.dtype), result)
    start = jnp.int32(0), empty, state
    _, results, state = jax.lax.while_loop(lambda carry: carry[0] < shape.repeats, body, start)
    return results, state


_Carry = tuple[jax.Array, StepResult, DeviceState]


def _single_step(
    model: StepModel, plan: StepPlan, shape: StepShape, inputs: StepInputs, state: DeviceState
) -> tuple[StepResult, DeviceState]:
    fields = inputs.fields
    layout = _layout(fields, shape, model, state.pools[0])
    if shape.drafts:
        state = state._replace(token_buffer=_write_drafts(state.token_buffer, fields, shape))
    tokens = state.token_buffer[fields.slot[layout.sequence], layout.positions]
    positions = Positions(layout.positions, fields.prompt_length[layout.sequence])
    # Decodes sample after every token, so only prompts have tokens whose hidden states are not needed.
    last = fields.last_token if shape.prefill_tokens else None
    selected = None if inputs.prompt_outputs else last
    adapted = model.adapted(fields, layout.sequence, selected)
    forward = partial(plan.forward(adapted, shape), adapted.embed(tokens), positions, layout.context)
    hidden, state = _run_layers(model, forward, layout.context, state, selected)
    prompts = None
    if inputs.prompt_outputs:
        prompts = _read_prompts(model, shape, layout, inputs, state.token_buffer, hidden)
        hidden = hidden[last]
    rows = _rows_of_tokens(fields, layout, shape) if shape.drafts else fields
    logits = model.logits(hidden, rows.adapter if shape.adapted else None)
    if inputs.constraints is None:
        sampled = greedy(logits)
    else:
        sampled = sample(logits, _sampling_rows(rows, state.token_buffer, inputs.constraints))
    slot = jnp.where(rows.samples > 0, rows.slot, state.token_buffer.shape[0])
    buffer = state.token_buffer.at[slot, rows.length].set(sampled.tokens, mode="drop")
    return StepResult(sampled, prompts), state._replace(token_buffer=buffer)


def _run_layers(
    model: StepModel,
    forward: Callable[..., Hidden],
    context: PagedContext,
    state: DeviceState,
    selected: jax.Array | None,
) -> tuple[jax.Array, DeviceState]:
    """Return hidden states, and the state with new pools and features. ``forward`` has all but pools and selection."""
    if state.features is None:
        hidden = forward(state.pools, selected)
        return hidden.states, state._replace(pools=tuple(hidden.pools))
    if model.fuse is None:  # a head, whose cache is its keys and values, and the features
        hidden = forward((*state.pools, state.features), selected)
        *pools, features = hidden.pools
        return hidden.states, state._replace(pools=tuple(pools), features=features)
    hidden = forward(state.pools, selected, model.taps)
    fused = jnp.concatenate(hidden.tapped, axis=-1) @ model.fuse
    features = put_features(state.features, fused, context.slots)
    return hidden.states, state._replace(pools=tuple(hidden.pools), features=features)


def _write_drafts(buffer: jax.Array, fields: StepFields, shape: StepShape) -> jax.Array:
    """Write drafts after the last known token of each decode, where the step reads its tokens."""
    offsets = jnp.arange(shape.drafts, dtype=jnp.int32)
    real = offsets + 1 < fields.decode_lengths[:, None]
    slot = jnp.where(real, fields.slot[:, None], buffer.shape[0])
    return buffer.at[slot, fields.length[:, None] + offsets].set(fields.drafts, mode="drop")


class _Layout(NamedTuple):
    """The T tokens of a step.

    Attributes:
        sequence: int32 [T], the row of each token's sequence in the per-sequence fields.
        positions: int32 [T], of each token in its sequence.
        real: bool [T], false for padding.
        context: where attention finds keys and values.
    """

    sequence: jax.Array
    positions: jax.Array
    real: jax.Array
    context: PagedContext


def _layout(fields: StepFields, shape: StepShape, model: StepModel, first_pool: Any) -> _Layout:
    blocks, size = num_blocks(first_pool), model.model.cache_layouts[0].block_size(first_pool)
    regions, sequences, positions, real = [], [], [], []
    for rows, sequence in _regions(fields, shape):
        regions.append(rows)
        offsets = jnp.arange(rows.query_length, dtype=jnp.int32)
        sequences.append(jnp.repeat(sequence, rows.query_length, total_repeat_length=rows.tokens))
        positions.append((rows.first_positions[:, None] + offsets).reshape(-1))
        real.append((offsets < rows.lengths[:, None]).reshape(-1))
    sequence, position, is_real = jnp.concatenate(sequences), jnp.concatenate(positions), jnp.concatenate(real)
    block = fields.block_tables[sequence, position // size]
    # A slot past the pool writes nothing: padding has no place in it.
    slots = jnp.where(is_real, block * size + position % size, blocks * size)
    return _Layout(sequence, position, is_real, PagedContext(tuple(regions), slots, model.mesh))


def _regions(fields: StepFields, shape: StepShape) -> Iterator[tuple[Rows, jax.Array]]:
    """Yield decode rows, then prefill rows, each with the sequence of every row."""
    tables = fields.block_tables
    if shape.decodes:
        first = jnp.maximum(fields.length[: shape.decodes] - 1, 0)
        sequence = jnp.arange(shape.decodes, dtype=jnp.int32)
        yield Rows(tables[: shape.decodes], first, fields.decode_lengths, shape.decode_length), sequence
    if shape.prefill_tokens:
        sequence = fields.row_sequence
        yield Rows(tables[sequence], fields.row_start, fields.row_tokens, shape.row_length), sequence


def _rows_of_tokens(fields: StepFields, layout: _Layout, shape: StepShape) -> StepFields:
    """Return the fields of samples after every token, as if each token were the last of its sequence."""
    per_sequence = ("slot", *SETTINGS)
    rows = {name: getattr(fields, name)[layout.sequence] for name in per_sequence}
    if shape.adapted:
        rows["adapter"] = fields.adapter[layout.sequence]
    lengths = layout.positions + 1
    last = lengths == (fields.length + fields.decode_lengths - 1)[layout.sequence]
    counts = layout.real & (last | (fields.samples[layout.sequence] != LAST_SAMPLE))
    return fields._replace(samples=counts.astype(jnp.int32), length=lengths, **rows)


def _read_prompts(
    model: StepModel,
    shape: StepShape,
    layout: _Layout,
    inputs: StepInputs,
    buffer: jax.Array,
    hidden: jax.Array,
) -> PromptRows:
    """Return the prompt outputs. Prompts come after the decodes in a step."""
    fields, first = inputs.fields, shape.decodes
    sequence, positions = layout.sequence[first:], layout.positions[first:]
    next_position = jnp.minimum(positions + 1, buffer.shape[1] - 1)
    return prompt_rows(
        hidden[first:],
        prompt=sequence - first,
        real=layout.real[first:],
        last_token=fields.last_token[first:] - first,
        next_token=buffer[fields.slot[sequence], next_position],
        logits=model.logits if inputs.prompt_outputs is PromptOutputs.LOGPROBS else None,
        adapter=fields.adapter[sequence] if shape.adapted else None,
    )


def _sampling_rows(fields: StepFields, buffer: jax.Array, constraints: SamplingConstraints) -> SamplingRows:
    floats = {name: jax.lax.bitcast_convert_type(getattr(fields, name), jnp.float32) for name in SAMPLING_FLOATS}
    return SamplingRows(
        **floats,
        top_k=fields.top_k,
        seed=jax.lax.bitcast_convert_type(fields.seed, jnp.uint32),
        history=buffer[fields.slot],
        length=fields.length,
        prompt_length=fields.prompt_length,
        allowed=constraints.allowed,
        biased=constraints.bias[:, 0],
        bias=jax.lax.bitcast_convert_type(constraints.bias[:, 1], jnp.float32),
    )
