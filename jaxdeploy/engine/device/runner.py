"""Compiled steps of a model, and the arrays on the device that they read and write."""

from __future__ import annotations

import logging
import timeit
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.features import Features, FeatureTap
from jaxdeploy.engine.device.host_blocks import GROUP, HostBlocks
from jaxdeploy.engine.device.inputs import ModelInputs, padding_inputs
from jaxdeploy.engine.device.step import DeviceState, StepArrays, StepProgram, StepResult, run_step
from jaxdeploy.engine.device.step_plan import StepPlan
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.adapters import Adapter
from jaxdeploy.engine.scheduling.host_tier import Transfer
from jaxdeploy.models.cache_layout import CacheLayout, FeaturesLayout, num_blocks
from jaxdeploy.models.lora import AdapterBank
from jaxdeploy.models.model import Model
from jaxdeploy.parallel.mesh import on_cpu
from jaxdeploy.parallel.sharding import replicated

logger = logging.getLogger("jaxdeploy")

BLOCKS_PER_CLEAR = 16
"""Blocks that one launch clears. A smaller group is padded."""

LOOP_IN_GRAPH = {
    "xla_gpu_enable_command_buffer": ("FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE")
}
"""What a CUDA graph may hold: XLA's default, and loops. Otherwise the host waits in every iteration of a loop."""


class ModelRunner:
    """Owner of a model's arrays on the device, and of its compiled steps.

    Attributes:
        weight_bytes: bytes of weights that a step reads, on all devices together. Embeddings are not counted: a step
            reads a few rows of them.
    """

    def __init__(
        self,
        model: Model,
        plan: StepPlan,
        state: DeviceState,
        *,
        adapters: tuple[AdapterBank, tuple[jax.Array, ...]] | None = None,
        features: Features | None = None,
        tap: FeatureTap | None = None,
    ) -> None:
        """Create a runner.

        Args:
            model: its weights are on the devices of ``plan``.
            plan: how steps are executed.
            state: pools and token buffer. The runner owns them from now on: launches donate them.
            adapters: a bank and its arrays, if sequences may have adapters. The runner owns the arrays.
            features: lent by their owner for each launch, to a head and to the model that has one.
            tap: how the model makes features; ``None`` for a head.
        """
        self._bank = adapters[0] if adapters else None
        self._program, weights = StepProgram.of(model, plan, self._bank, tap.taps if tap else ())
        self._arrays = StepArrays(weights, tap.fuse if tap else None, adapters[1] if adapters else ())
        self.weight_bytes = _bytes_read(model)
        self._own_state = state
        self._features = features
        self._host_blocks = HostBlocks(state.pools)
        borrowed = self._borrow_state()
        self._state_shardings = jax.tree.map(lambda array: array.sharding, borrowed)
        self._state_shapes = jax.tree.map(_shape, borrowed)
        self._replicated = replicated(plan.mesh)
        layouts = model.cache_layouts[: len(state.pools)]  # those of a head end with its features
        self._clear = jax.jit(partial(_cleared, layouts), donate_argnums=0, out_shardings=self._state_shardings)
        self._on_gpu = not on_cpu(plan.mesh)
        self._vocab_size = model.config.vocab_size
        self._steps: dict[_Variant, Any] = {}
        self._warm = False

    def _borrow_state(self) -> DeviceState:
        """Return what the next launch takes and donates: the own arrays, and the features from their owner."""
        if self._features is None:
            return self._own_state
        return self._own_state._replace(features=self._features.borrow())

    def _give_back(self, state: DeviceState) -> None:
        """Take over what a launch returned for the arrays that it donated, and give the features back."""
        if self._features is not None and state.features is not None:
            self._features.give_back(state.features)
        self._own_state = state._replace(features=None)

    def write_tokens(self, slot: int, token_ids: list[int]) -> None:
        """Put the tokens of a sequence that begins to run into its row of the buffer."""
        buffer = self._own_state.token_buffer
        row = np.zeros((buffer.shape[1],), np.int32)
        row[: len(token_ids)] = token_ids
        self._own_state = self._own_state._replace(token_buffer=_write_row(buffer, np.int32(slot), row))

    @property
    def intact(self) -> bool:
        """Whether the state exists: a step that fails after it was donated deletes its arrays."""
        return not any(array.is_deleted() for array in jax.tree.leaves(self._borrow_state()))

    def clear_blocks(self, blocks: list[int]) -> None:
        """Launch a program that overwrites the content of KV blocks, so that nothing in them is NaN or infinite."""
        nowhere = num_blocks(self._own_state.pools[0])
        for start in range(0, max(len(blocks), 1), BLOCKS_PER_CLEAR):
            some = blocks[start : start + BLOCKS_PER_CLEAR]
            padded = np.array(some + [nowhere] * (BLOCKS_PER_CLEAR - len(some)), np.int32)
            self._give_back(self._clear(self._borrow_state(), padded))

    def copy_blocks(self, transfers: Iterable[Transfer]) -> None:
        """Launch copies of blocks between device and host, in their order."""
        pools = self._host_blocks.copy(self._own_state.pools, transfers)
        self._own_state = self._own_state._replace(pools=pools)

    def upload(self, uploads: Iterable[tuple[int, Adapter]]) -> None:
        """Launch copies of adapters into slots, in their order."""
        for slot, adapter in uploads:
            assert self._bank is not None, "an engine without a bank has no adapters"
            adapters = self._bank.put(self._arrays.adapters, slot, adapter.content)
            self._arrays = self._arrays._replace(adapters=adapters)

    def run(self, inputs: ModelInputs) -> StepResult:
        """Launch one step. The result has device arrays of ``inputs.shape.samples`` rows, on their way to the host."""
        step = self._step(_variant(inputs))
        result: StepResult
        result, state = step(self._arrays_of(inputs.shape), self._borrow_state(), *_from_host(inputs))
        self._give_back(state)
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

    def prepare(self, shapes: list[StepShape], prompt_outputs: PromptOutputs) -> None:
        """Compile steps of ``shapes`` with these prompt outputs, unless they are compiled. Any thread may call it."""
        for shape in shapes:
            inputs = padding_inputs(shape, self._vocab_size, full_sampler=True, prompt_outputs=prompt_outputs)
            variant = _variant(inputs)
            if variant not in self._steps:
                self._steps[variant] = self.compiled(inputs)

    def seconds_to_restore(self) -> float:
        """Return the time to copy a block from host memory to the device. Compiles the copies."""
        saves = [Transfer(0, block, to_device=False) for block in range(GROUP)]
        restores = [Transfer(0, block, to_device=True) for block in range(GROUP)]
        self.copy_blocks(saves)

        def copy() -> None:
            self.copy_blocks(restores)
            jax.block_until_ready(self._own_state.pools)

        seconds = _seconds(copy) / GROUP
        self._host_blocks.clear()
        return seconds

    def seconds_to_compute(self, shape: StepShape) -> float:
        """Return the time of a step of ``shape`` for each of its prompt tokens."""
        inputs = padding_inputs(shape, self._vocab_size, full_sampler=False)
        return _seconds(lambda: jax.block_until_ready(self.run(inputs))) / shape.prefill_tokens

    def compiled(self, inputs: ModelInputs) -> jax.stages.Compiled:
        """Return the program that ``run`` uses for ``inputs``, to inspect its memory and instructions."""
        return self.lowered(inputs).compile()

    def lowered(self, inputs: ModelInputs) -> jax.stages.Lowered:
        """Return the same program before it is compiled."""
        arrays = jax.tree.map(_shape, self._arrays_of(inputs.shape))
        step = self._jitted(_variant(inputs))
        lowered: jax.stages.Lowered = step.lower(arrays, self._state_shapes, *_from_host(inputs))
        return lowered

    def close(self) -> None:
        """Give the device memory back; the runner is of no use afterwards."""
        for array in jax.tree.leaves((self._arrays, self._borrow_state())):
            array.delete()  # arrays that runners share may be deleted already
        self._arrays = StepArrays(())
        self._own_state = self._own_state._replace(pools=())
        self._host_blocks.clear()
        self._steps.clear()

    def _arrays_of(self, shape: StepShape) -> StepArrays:
        """Return what a step of ``shape`` reads. Without adapters it is the program of an engine without a bank."""
        return self._arrays if shape.adapted else self._arrays._replace(adapters=())

    def _step(self, variant: _Variant) -> Any:
        if variant not in self._steps:
            if self._warm:
                logger.warning("compiling a step after warm-up: %s; this stalls every running request", variant.shape)
            self._steps[variant] = self._jitted(variant)
        return self._steps[variant]

    def _jitted(self, variant: _Variant) -> Any:
        return jax.jit(
            partial(run_step, self._program, variant.shape, prompt_outputs=variant.prompt_outputs),
            donate_argnums=1,  # the state
            out_shardings=(self._replicated, self._state_shardings),
            compiler_options=LOOP_IN_GRAPH if variant.shape.repeats > 1 and self._on_gpu else None,
        )


class _Variant(NamedTuple):
    """The static part of a step: each value is a program."""

    shape: StepShape
    full_sampler: bool
    prompt_outputs: PromptOutputs


def _variant(inputs: ModelInputs) -> _Variant:
    return _Variant(inputs.shape, inputs.constraints is not None, inputs.prompt_outputs)


def _from_host(inputs: ModelInputs) -> tuple[Any, ...]:
    """Return the arrays of a step that come from the host."""
    return (inputs.packed,) if inputs.constraints is None else (inputs.packed, inputs.constraints)


def _bytes_read(model: Model) -> int:
    parts = [model] if model.config.tie_embeddings else [model, model.embedding]
    everything, *rows_of = (sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(part))) for part in parts)
    return int(everything - sum(rows_of))


def _shape(array: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _seconds(work: Callable[[], Any]) -> float:
    """Return the shortest time of three runs, after one for warm-up."""
    work()
    return min(timeit.repeat(work, number=1, repeat=3))


def _cleared(layouts: tuple[CacheLayout, ...], state: DeviceState, blocks: jax.Array) -> DeviceState:
    """Return ``state`` with new content in ``blocks`` int32 [BLOCKS_PER_CLEAR]. Blocks beyond the pools are ignored."""
    pools = tuple(layout.cleared(pool, blocks) for layout, pool in zip(layouts, state.pools, strict=True))
    features = state.features
    if features is not None:
        features = FeaturesLayout(features.shape[-1]).cleared(features, blocks)
    return state._replace(pools=pools, features=features)


@partial(jax.jit, donate_argnums=0)
def _write_row(buffer: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
    return buffer.at[slot].set(row)
