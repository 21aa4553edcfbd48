"""The device's side of a step: one jitted function from packed inputs to sampled tokens, with the KV cache donated."""

from __future__ import annotations

import logging
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.host_blocks import GROUP, HostBlocks
from jaxdeploy.engine.device.inputs import (
    LAST_SAMPLE,
    SAMPLING_FLOATS,
    ModelInputs,
    SamplingConstraints,
    StepFields,
    padding_inputs,
)
from jaxdeploy.engine.device.kv_cache import UNIT_RANGE
from jaxdeploy.engine.device.prompt_reading import PromptRows, read
from jaxdeploy.engine.device.sampler import Sampled, SamplingRows, greedy, sample
from jaxdeploy.engine.device.step_plan import StepPlan
from jaxdeploy.engine.device.step_weights import StepWeights, flatten
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.adapters import Adapter
from jaxdeploy.engine.scheduling.host_tier import Transfer
from jaxdeploy.models.attention import PagedContext, Rows
from jaxdeploy.models.eagle3 import put_features
from jaxdeploy.models.lora import AdapterBank
from jaxdeploy.models.model import Model, Positions
from jaxdeploy.parallel.sharding import replicated
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size, stored

logger = logging.getLogger("jaxdeploy")

Pools = tuple[Pool, ...]


CLEARED = 16
"""Blocks that one launch clears. The rest of a smaller group is padding."""

LOOP_IN_GRAPH = {
    "xla_gpu_enable_command_buffer": ("FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE")
}
"""XLA's own choice of what a CUDA graph may hold, and loops: without them the host would wait in every round of one."""


class Features:
    """Features of tokens [P, S, D], found by the tables of blocks: a model's steps write them for its head.

    Several runners hold them: the device runs their steps in the order of their launch.
    """

    def __init__(self, array: jax.Array) -> None:
        self.array = array


class FeatureTap(NamedTuple):
    """How the steps of a model make features for its head.

    Attributes:
        taps: the layers before which the residual stream is taken.
        fuse: [taps · D, D], the matrix that makes features of it.
    """

    taps: tuple[int, ...]
    fuse: jax.Array


class StepResult(NamedTuple):
    """What a step samples, and what it tells of the prompts that it computes."""

    sampled: Sampled
    prompts: PromptRows | None = None


class ModelRunner:
    """Weights, KV pools and the token buffer on the device, and the compiled steps over them.

    The token buffer int32 [slots, L] holds the tokens of every running sequence: a step reads its inputs there and
    writes what it sampled, so the next step needs no token from the host. ``weight_bytes`` is what a step reads of the
    weights, on all devices together: all but the embeddings, of which it takes a few rows. ``adapters`` is a
    bank and its arrays, where there are to be any; ``features`` are the last pool of a head, and written by a model
    with a ``tap``.
    """

    def __init__(
        self,
        model: Model,
        pools: Pools,
        mesh: Mesh,
        plan: StepPlan,
        *,
        slots: int,
        session_len: int,
        adapters: tuple[AdapterBank, tuple[jax.Array, ...]] | None = None,
        features: Features | None = None,
        tap: FeatureTap | None = None,
    ) -> None:
        self._bank = adapters[0] if adapters else None
        self._adapters = adapters[1] if adapters else ()
        self._forward, self._leaves = flat_step(model, mesh, plan, self._bank, tap.taps if tap else ())
        if tap is not None:
            self._leaves += (tap.fuse,)
        self._features = features
        self.weight_bytes = _bytes_read(model)
        self._pools = pools
        self._host_blocks = HostBlocks(pools)
        self._pool_shardings = jax.tree.map(lambda array: array.sharding, self._all_pools)
        self._clear = jax.jit(_cleared, donate_argnums=0, out_shardings=self._pool_shardings)
        self._replicated = replicated(mesh)
        self._on_gpu = mesh.devices.flat[0].platform != "cpu"
        self._vocab_size = model.config.vocab_size
        self._buffer = jax.device_put(np.zeros((slots, session_len), np.int32), self._replicated)
        self._held = jax.tree.map(_shape, (self._all_pools, self._buffer))
        self._steps: dict[_Variant, Any] = {}
        self._warm = False

    def write_tokens(self, slot: int, token_ids: list[int]) -> None:
        """Put the tokens of a sequence that begins to run into its row of the buffer."""
        row = np.zeros((self._buffer.shape[1],), np.int32)
        row[: len(token_ids)] = token_ids
        self._buffer = _write_row(self._buffer, np.int32(slot), row)

    @property
    def intact(self) -> bool:
        """Whether pools and token buffer exist: a step that fails after they were donated takes them along."""
        return not any(array.is_deleted() for array in (*jax.tree.leaves(self._all_pools), self._buffer))

    def clear_blocks(self, blocks: list[int]) -> None:
        """Launch a program that overwrites the content of KV blocks, so that nothing in them is NaN or infinite."""
        nowhere = stored(self._all_pools[0]).shape[0]
        for start in range(0, max(len(blocks), 1), CLEARED):
            some = blocks[start : start + CLEARED]
            padded = np.array(some + [nowhere] * (CLEARED - len(some)), np.int32)
            *pools, last = self._clear(self._all_pools, padded)
            if self._features is None:
                pools.append(last)
            else:
                self._features.array = last
            self._pools = tuple(pools)

    def copy_blocks(self, transfers: Iterable[Transfer]) -> None:
        """Launch copies of blocks between device and host, in their order."""
        self._pools = self._host_blocks.carry_out(self._pools, transfers)

    def upload(self, uploads: Iterable[tuple[int, Adapter]]) -> None:
        """Launch copies of adapters into slots, in their order."""
        for slot, adapter in uploads:
            assert self._bank is not None, "an engine without a bank has no adapters"
            self._adapters = self._bank.put(self._adapters, slot, adapter.content)

    def run(self, inputs: ModelInputs) -> StepResult:
        """Launch one step; what it samples are device arrays of ``inputs.shape.samples`` rows, on their way here."""
        step = self._step(_variant(inputs))
        result: StepResult
        result, pools, self._buffer = step(self._weights(inputs.shape), self._all_pools, self._buffer, *_arrays(inputs))
        if self._features is not None:
            *pools, self._features.array = pools
        self._pools = tuple(pools)
        if self._on_gpu:  # a CPU's memory is the host's
            jax.copy_to_host_async(result)
        return result

    def warm_up(self, shapes: list[StepShape], progress: Callable[[list[Any]], Any]) -> None:
        """Compile every step and run it on padding until its CUDA graph exists; a later compile logs a warning."""
        runs = 3 if self._on_gpu else 1
        self.write_tokens(0, [])
        self.clear_blocks([])
        for shape, full in progress([(shape, full) for shape in shapes for full in (False, True)]):
            inputs = padding_inputs(shape, self._vocab_size, full_sampler=full)
            for _ in range(runs):
                jax.block_until_ready(self.run(inputs))
        self._warm = True

    def prepare(self, shapes: list[StepShape], reading: PromptOutputs) -> None:
        """Compile the steps of ``shapes`` that read prompts, unless they are there. Any thread may call it."""
        for shape in shapes:
            inputs = padding_inputs(shape, self._vocab_size, full_sampler=True, prompt_outputs=reading)
            variant = _variant(inputs)
            if variant not in self._steps:
                self._steps[variant] = self.compiled(inputs)

    def seconds_to_restore(self) -> float:
        """How long a block takes from host memory to the device; compiles the copies and leaves nothing behind."""
        there = [Transfer(0, block, to_device=False) for block in range(GROUP)]
        back = [Transfer(0, block, to_device=True) for block in range(GROUP)]
        self.copy_blocks(there)

        def copy() -> None:
            self.copy_blocks(back)
            jax.block_until_ready(self._pools)

        seconds = _seconds(copy) / GROUP
        self._host_blocks.clear()
        return seconds

    def seconds_to_compute(self, shape: StepShape) -> float:
        """How long one of the prompt tokens takes in a step of ``shape``, when all are computed together."""
        inputs = padding_inputs(shape, self._vocab_size, full_sampler=False)
        return _seconds(lambda: jax.block_until_ready(self.run(inputs))) / shape.prefill_tokens

    def compiled(self, inputs: ModelInputs) -> jax.stages.Compiled:
        """The program that ``run`` would use for such inputs, to look at its memory and its instructions."""
        return self.lowered(inputs).compile()

    def lowered(self, inputs: ModelInputs) -> jax.stages.Lowered:
        """The same before it is compiled."""
        held = jax.tree.map(_shape, self._weights(inputs.shape)), *self._held
        lowered: jax.stages.Lowered = self._jitted(_variant(inputs)).lower(*held, *_arrays(inputs))
        return lowered

    def close(self) -> None:
        """Give the device memory back; the runner is of no use afterwards."""
        for array in (*self._leaves, *self._adapters, *jax.tree.leaves(self._all_pools), self._buffer):
            array.delete()  # what runners share has been deleted already by one of them
        self._leaves, self._adapters, self._pools = (), (), ()
        self._host_blocks.clear()
        self._steps.clear()

    @property
    def _all_pools(self) -> Pools:
        return self._pools if self._features is None else (*self._pools, self._features.array)

    def _weights(self, shape: StepShape) -> tuple[jax.Array, ...]:
        return (*self._leaves, *self._adapters) if shape.adapted else self._leaves

    def _step(self, variant: _Variant) -> Any:
        if variant not in self._steps:
            if self._warm:
                logger.warning("compiling a step after warm-up: %s; this stalls every running request", variant.shape)
            self._steps[variant] = self._jitted(variant)
        return self._steps[variant]

    def _jitted(self, variant: _Variant) -> Any:
        return jax.jit(
            partial(self._forward, variant.shape, reading=variant.reading),
            donate_argnums=(1, 2),
            out_shardings=(self._replicated, self._pool_shardings, self._replicated),
            compiler_options=LOOP_IN_GRAPH if variant.shape.repeats > 1 and self._on_gpu else None,
        )


class _Variant(NamedTuple):
    """What makes a step another program."""

    shape: StepShape
    full_sampler: bool
    reading: PromptOutputs


def _variant(inputs: ModelInputs) -> _Variant:
    return _Variant(inputs.shape, inputs.constraints is not None, inputs.prompt_outputs)


def _arrays(inputs: ModelInputs) -> tuple[Any, ...]:
    """What a step takes beside weights, pools and buffer."""
    return (inputs.packed,) if inputs.constraints is None else (inputs.packed, inputs.constraints)


def flat_step(
    model: Model, mesh: Mesh, plan: StepPlan, bank: AdapterBank | None = None, taps: tuple[int, ...] = ()
) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """A step as a pure function of arrays, and the model's weights as the tuple that it takes.

    The function takes ``(shape, weights, pools, buffer, packed[, constraints])`` and gives ``(result, pools, buffer)``;
    donate pools and buffer. In an adapted step the arrays of ``bank`` stand behind the weights. With ``taps`` features
    are written: their pool is the last, what fuses them stands right behind the weights.
    """
    weights, arrays = flatten(model, mesh)
    return partial(_forward, weights, plan, bank, _Fusion(taps, len(arrays)) if taps else None), arrays


def _bytes_read(model: Model) -> int:
    parts = [model] if model.config.tie_embeddings else [model, model.embedding]
    everything, *rows_of = (sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(part))) for part in parts)
    return int(everything - sum(rows_of))


def _shape(array: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest of three runs, after one to warm up."""
    work()
    return min(timeit.repeat(work, number=1, repeat=3))


def _cleared(pools: Pools, blocks: jax.Array) -> Pools:
    """``pools`` with new content in ``blocks`` int32 [CLEARED]; one that is beyond the pools is nowhere."""

    def cleared(pool: Pool) -> Pool:
        if not isinstance(pool, QuantizedPool):
            return pool.at[blocks].set(0, mode="drop")
        values = pool.values.at[blocks].set(0, mode="drop")
        if pool.calibrated:
            return replace(pool, values=values)
        return replace(pool, values=values, scales=pool.scales.at[blocks].set(UNIT_RANGE, mode="drop"))

    return tuple(map(cleared, pools))


@partial(jax.jit, donate_argnums=0)
def _write_row(buffer: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
    return buffer.at[slot].set(row)


def _forward(
    weights: StepWeights,
    plan: StepPlan,
    bank: AdapterBank | None,
    fusion: _Fusion | None,
    shape: StepShape,
    arrays: tuple[jax.Array, ...],
    pools: Pools,
    buffer: jax.Array,
    packed: jax.Array,
    constraints: SamplingConstraints | None = None,
    *,
    reading: PromptOutputs = PromptOutputs.NONE,
) -> tuple[StepResult, Pools, jax.Array]:
    """One step; or several in a row, whose samples are stacked."""
    fields = StepFields.of(packed, shape)
    adapters = _Adapters(bank, arrays[-bank.arrays :]) if bank is not None and shape.adapted else None
    fuse = None if fusion is None else _Fuse(fusion.taps, arrays[fusion.place])
    one = partial(_once, weights.model(arrays), plan, adapters, fuse, weights.mesh, shape, constraints, reading)
    if shape.repeats == 1:
        return one(fields, pools, buffer)

    def step(carry: _Carry) -> _Carry:
        index, results, pools, buffer = carry
        new, pools, buffer = one(fields._replace(length=fields.length + index), pools, buffer)
        return index + 1, jax.tree.map(lambda all_, row: all_.at[index].set(row), results, new), pools, buffer

    result = jax.eval_shape(one, fields, pools, buffer)[0]
    empty = jax.tree.map(lambda row: jnp.zeros((shape.repeats, *row.shape), row.dtype), result)
    start = jnp.int32(0), empty, pools, buffer
    _, results, pools, buffer = jax.lax.while_loop(lambda carry: carry[0] < shape.repeats, step, start)
    return results, pools, buffer


_Carry = tuple[jax.Array, StepResult, Pools, jax.Array]


class _Fusion(NamedTuple):
    """Before which layers features are taken, and which of a step's arrays fuses them."""

    taps: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class _Fuse:
    """Makes features [T, D] of the residual stream before the layers ``taps``."""

    taps: tuple[int, ...]
    weight: jax.Array

    def __call__(self, tapped: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.concatenate(tapped, axis=-1) @ self.weight


class _Adapters(NamedTuple):
    """Those that a step's sequences may have."""

    bank: AdapterBank
    arrays: tuple[jax.Array, ...]


def _once(
    model: Model,
    plan: StepPlan,
    adapters: _Adapters | None,
    fuse: _Fuse | None,
    mesh: Mesh,
    shape: StepShape,
    constraints: SamplingConstraints | None,
    reading: PromptOutputs,
    fields: StepFields,
    pools: Pools,
    buffer: jax.Array,
) -> tuple[StepResult, Pools, jax.Array]:
    """Embed → layers → logits of the last tokens → sample → note the tokens in the buffer."""
    layout = _layout(fields, shape, pools[0], mesh)
    if shape.drafts:
        buffer = _write_drafts(buffer, fields, shape)
    tokens = buffer[fields.slot[layout.sequence], layout.positions]
    lengths = fields.prompt_length[layout.sequence]
    last = fields.last_token if shape.prefill_tokens else None  # of single tokens each is the last
    wanted = None if reading else last
    own, logits_of = model, _logits_of(model, adapters)
    if adapters is not None:
        own = adapters.bank.adapted(model, adapters.arrays, fields.adapter[layout.sequence], wanted)
    where = model.embed(tokens), Positions(layout.positions, lengths), layout.context
    forward = plan.forward(own, shape)
    if fuse is None:
        hidden, new_pools, _ = forward(*where, pools, wanted)
    else:
        hidden, new_pools, tapped = forward(*where, pools[:-1], wanted, fuse.taps)
        new_pools = (*new_pools, put_features(stored(pools[-1]), fuse(tapped), layout.context.slots))
    prompts = None
    if reading:
        prompts = _read(logits_of, shape, layout, fields, buffer, hidden, reading)
        hidden = hidden[last]
    rows = _row_for_each_token(fields, layout, adapted=shape.adapted) if shape.drafts else fields
    logits = logits_of(hidden, rows.adapter if shape.adapted else None)
    sampled = greedy(logits) if constraints is None else sample(logits, _sampling_rows(rows, buffer, constraints))
    slot = jnp.where(rows.samples > 0, rows.slot, buffer.shape[0])
    buffer = buffer.at[slot, rows.length].set(sampled.tokens, mode="drop")
    return StepResult(sampled, prompts), cast(Pools, tuple(new_pools)), buffer


def _logits_of(model: Model, adapters: _Adapters | None) -> Callable[[jax.Array, jax.Array | None], jax.Array]:
    """Hidden states [T, D], and the slots int32 [T] of their adapters if there are any → logits float32 [T, V]."""

    def logits_of(hidden: jax.Array, slots: jax.Array | None) -> jax.Array:
        if adapters is None or slots is None:
            return model.logits(hidden)
        return adapters.bank.logits(model, adapters.arrays, hidden, slots)

    return logits_of


def _write_drafts(buffer: jax.Array, fields: StepFields, shape: StepShape) -> jax.Array:
    """Drafts behind the last known token of each decode, where the step reads its tokens."""
    behind = jnp.arange(shape.drafts, dtype=jnp.int32)
    real = behind + 1 < fields.decode_lengths[:, None]
    slot = jnp.where(real, fields.slot[:, None], buffer.shape[0])
    return buffer.at[slot, fields.length[:, None] + behind].set(fields.drafts, mode="drop")


def _row_for_each_token(fields: StepFields, layout: _Layout, *, adapted: bool) -> StepFields:
    """The fields for samples after every token of the step, as if each were the last of its sequence."""
    per_sequence = ("slot", "prompt_length", "top_k", "seed", *SAMPLING_FLOATS)
    rows = {name: getattr(fields, name)[layout.sequence] for name in per_sequence}
    if adapted:
        rows["adapter"] = fields.adapter[layout.sequence]
    behind = layout.positions + 1
    last = behind == (fields.length + fields.decode_lengths - 1)[layout.sequence]
    counts = layout.real & (last | (fields.samples[layout.sequence] != LAST_SAMPLE))
    return fields._replace(samples=counts.astype(jnp.int32), length=behind, **rows)


class _Layout(NamedTuple):
    """For each of the step's T tokens its sequence (row of the per-sequence fields) and position, and where KV is.

    ``real`` is false for padding.
    """

    sequence: jax.Array
    positions: jax.Array
    real: jax.Array
    context: PagedContext


def _layout(fields: StepFields, shape: StepShape, pool: Pool, mesh: Mesh) -> _Layout:
    blocks, size = stored(pool).shape[0], block_size(pool)
    regions, sequences, positions, real = [], [], [], []
    for rows, sequence in _regions(fields, shape):
        regions.append(rows)
        offsets = jnp.arange(rows.query_length, dtype=jnp.int32)
        sequences.append(jnp.repeat(sequence, rows.query_length, total_repeat_length=rows.tokens))
        positions.append((rows.first_positions[:, None] + offsets).reshape(-1))
        real.append((offsets < rows.lengths[:, None]).reshape(-1))
    sequence, position, is_real = jnp.concatenate(sequences), jnp.concatenate(positions), jnp.concatenate(real)
    block = fields.block_tables[sequence, position // size]
    slots = jnp.where(is_real, block * size + position % size, blocks * size)
    return _Layout(sequence, position, is_real, PagedContext(tuple(regions), slots, mesh))


def _read(
    logits_of: Callable[[jax.Array, jax.Array | None], jax.Array],
    shape: StepShape,
    layout: _Layout,
    fields: StepFields,
    buffer: jax.Array,
    hidden: jax.Array,
    reading: PromptOutputs,
) -> PromptRows:
    """Of the prompts alone, which stand behind the decodes."""
    first = shape.decodes
    sequence, positions = layout.sequence[first:], layout.positions[first:]
    behind = jnp.minimum(positions + 1, buffer.shape[1] - 1)
    return read(
        hidden[first:],
        prompt=sequence - first,
        real=layout.real[first:],
        last_token=fields.last_token[first:] - first,
        next_token=buffer[fields.slot[sequence], behind],
        logits=logits_of if reading is PromptOutputs.LOGPROBS else None,
        adapter=fields.adapter[sequence] if shape.adapted else None,
    )


def _regions(fields: StepFields, shape: StepShape) -> Iterator[tuple[Rows, jax.Array]]:
    """Decode rows, then prefill rows, each with the sequence of every row."""
    tables = fields.block_tables
    if shape.decodes:
        lengths = fields.decode_lengths
        first = jnp.maximum(fields.length[: shape.decodes] - 1, 0)
        sequence = jnp.arange(shape.decodes, dtype=jnp.int32)
        yield Rows(tables[: shape.decodes], first, lengths, shape.decode_length), sequence
    if shape.prefill_tokens:
        sequence = fields.row_sequence
        yield Rows(tables[sequence], fields.row_start, fields.row_tokens, shape.row_length), sequence


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
