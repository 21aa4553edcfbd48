"""What ``gpu_compile.py`` compiles for GPUs that are not here, and what it reads out of each program."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_step import compile_llama_8b
from jax.sharding import Mesh

from jaxdeploy.checkpoint.adapter import adaptable
from jaxdeploy.checkpoint.quantized import hold_quantized
from jaxdeploy.checkpoint.tensors import TensorFiles
from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.inputs import packed_size, padding_inputs
from jaxdeploy.engine.device.runner import LOOP_IN_GRAPH
from jaxdeploy.engine.device.step import DeviceState, StepArrays, StepProgram, run_step
from jaxdeploy.engine.device.step_plan import plan_steps
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder, abstract_decoder
from jaxdeploy.models.dense import DenseDecoder
from jaxdeploy.models.families import llama
from jaxdeploy.models.lora import AdapterBank, bank_of
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.rope import RopeConfig
from pallas_kernels.dispatch import OPS, NoBackendError, dispatch
from pallas_kernels.kv_pool import QuantizedPool
from pallas_kernels.offline import KernelCode, Program, compile_for, disassemble
from pallas_kernels.offline.devices import offline_devices

STEP_BATCH = 8

ENGINE_STEPS = {"decode": (8, 0), "mixed": (8, 512), "prefill": (0, 512)}
"""Steps of the engine: decoding sequences and prompt tokens."""

DRAFTS = 7
ADAPTERS = 16
"""Of steps that verify guesses, and of those whose sequences have LoRA adapters."""

IN_A_ROW = 4
"""Tokens that a step decodes in a row, in a loop on the device."""

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}

ENGINE_POOL = (1024, 2, 8, 64, 128)
VOCAB = 128256
SLOTS, SESSION_LEN, TABLE_LENGTH = 256, 4096, 64


@dataclass(frozen=True)
class Entry:
    """One compilation: a backend of an op at one of the op's shapes."""

    op: str
    backend: str
    shape: Any

    @property
    def phase(self) -> str | None:
        """``decode``, ``prefill``, or nothing where the op knows no such difference."""
        return getattr(self.shape, "phase", None)

    @property
    def kv(self) -> str | None:
        """What the KV pool holds, for attention."""
        return getattr(self.shape, "kv", None)


def entries(device: str) -> Iterator[Entry]:
    """What is compiled for ``device``: one shape of each phase and pool; on an H200 all that have a bar besides."""
    for op in OPS:
        backends = importlib.import_module(f"pallas_kernels.{op}").BACKENDS
        shapes = importlib.import_module(f"pallas_kernels.{op}.shapes").SHAPES
        for backend in (name for name in backends if name.startswith("pallas_")):
            seen = set()
            for shape in shapes:
                entry = Entry(op, backend, shape)
                kind = (entry.phase, entry.kv)
                if kind not in seen or (device == "h200" and shape.bar):
                    yield entry
                seen.add(kind)


@dataclass(frozen=True)
class Found:
    """A kernel's ``figures``; where its instructions are to be counted, its ``code`` and what a trip consumes."""

    figures: dict[str, Any]
    code: KernelCode | None = None
    elements_per_thread: float = 0

    @classmethod
    def nothing(cls, entry: Entry, device: str, **why: str) -> Found:
        """No kernel, and why there is none."""
        return cls({**describe(entry, device), **why})


def measure(entry: Entry, device: str) -> list[Found]:
    """Compile ``entry`` and describe its kernels; ``refused`` holds the reason where the backend does not do the call.

    Within ``kernels_compiled_once``, those that no entry before had. ``count_instructions`` completes the figures.
    """
    shapes = importlib.import_module(f"pallas_kernels.{entry.op}.shapes")
    call = jax.eval_shape(lambda: shapes.make_call(entry.shape))
    try:
        program = compile_for(device, partial(dispatch, backend=entry.backend), call)
    except NoBackendError as refusal:
        return [Found.nothing(entry, device, refused=str(refusal))]
    per_trip: dict[str, int] = {}
    if entry.backend == "pallas_triton":
        elements = shapes.elements_per_trip(entry.shape, shapes.tiles_for(entry.shape, device))
        per_trip = elements if isinstance(elements, dict) else {entry.op: elements}
    found = []
    launched = {*program.kernels, *(launch.name for launch in program.launches)}
    assert any(name.startswith(entry.op) for name in launched), f"no kernel of {entry.op} is in {launched}"
    for unique in sorted(program.kernels):
        name = re.sub(r"__\d+$", "", unique)  # XLA counts kernels that it has compiled by one name
        if name.startswith(entry.op):
            code, launch = program.kernels[unique], program.launched(unique)
            figures = {
                "kernel": name,
                "registers": code.registers,
                "spills": code.spills,
                "smem_bytes": launch.smem_bytes + code.static_smem,
                "threads": launch.threads,
                "ctas": math.prod(launch.grid),
                "instructions_per_element": None,
                "temp_bytes": program.memory.temp_size_in_bytes,
                "argument_bytes": program.memory.argument_size_in_bytes,
            }
            counted = code if name in per_trip else None
            found.append(Found({**describe(entry, device), **figures}, counted, per_trip.get(name, 0) / launch.threads))
    return found


def count_instructions(found: list[Found]) -> None:
    """Set ``instructions_per_element`` of kernels of one device: instructions of the hot loop per element it consumes.

    That is for kernels with a loop that all their threads run: not for those of Mosaic GPU, whose warpgroups do
    different things.
    """
    counted = [(kernel, kernel.code) for kernel in found if kernel.code is not None]
    codes = disassemble([code for _, code in counted])
    for (kernel, _), code in zip(counted, codes, strict=True):
        if trip := len(code.hot_loop()):
            kernel.figures["instructions_per_element"] = round(trip / kernel.elements_per_thread, 3)


def describe(entry: Entry, device: str) -> dict[str, Any]:
    """What is compiled; its figures, or why there are none, go beside it."""
    return {
        "op": entry.op,
        "backend": entry.backend,
        "phase": entry.phase,
        "kv": entry.kv,
        "shape": str(entry.shape),
        "bar": bool(entry.shape.bar),
        "device": device,
    }


def measure_step(tp: int) -> dict[str, Any]:
    """Compile the decode step of a Llama-3-8B in W4A16 for ``tp`` H200 and count what it launches."""
    compiled = compile_llama_8b("h200", batch=STEP_BATCH, tp=tp)
    program = compiled.program
    return {
        "jax": jax.__version__,
        "tp": tp,
        "batch": STEP_BATCH,
        "layers": compiled.layers,
        "launches_per_layer": round(compiled.launches_per_layer, 2),
        "command_buffers": program.command_buffers,
        "outside_command_buffers": program.outside_command_buffers,
        "temp_bytes": program.memory.temp_size_in_bytes,
        "alias_bytes": program.memory.alias_size_in_bytes,
        "pool_copies": compiled.pool_copies,
        "weight_copies": compiled.weight_copies,
    }


def measure_engine() -> list[dict[str, Any]]:
    """Compile steps of the engine with layers of a Llama-3-8B: what a layer launches, and what is copied."""
    plain = [
        _measure_engine_step(name, StepShape(*sizes, TABLE_LENGTH, SLOTS), small=small)
        for small in (False, True)
        for name, sizes in ENGINE_STEPS.items()
    ]
    decode, row = (StepShape(STEP_BATCH, 0, TABLE_LENGTH, SLOTS, repeats) for repeats in (1, IN_A_ROW))
    return [
        *plain,
        _measure_engine_step("decode, sampling", decode, small=True, sampling=True),
        _measure_engine_step("decode in a row", row, small=True),
        _measure_engine_step("verify", StepShape(1, 0, TABLE_LENGTH, SLOTS, drafts=DRAFTS), small=False),
        _measure_engine_step("adapted decode", replace(decode, adapted=True), small=False),
    ]


def _measure_engine_step(name: str, shape: StepShape, *, small: bool, sampling: bool = False) -> dict[str, Any]:
    """``launches`` counts a loop's once, and so does ``launches_per_layer``."""
    few, more = (_engine_step(layers, shape, small=small, sampling=sampling) for layers in (1, 2))
    return {
        "jax": jax.__version__,
        "step": name,
        "weights": "W4A16" if small else "bf16",
        "kv": "int8" if small else "bf16",
        "launches": more.on_device,
        "launches_per_layer": more.on_device - few.on_device,
        "command_buffers": more.command_buffers,
        "outside_command_buffers": more.outside_command_buffers,
        "temp_bytes": more.memory.temp_size_in_bytes,
        "pool_copies": more.copies(f"{'u8' if small else 'bf16'}[{','.join(map(str, ENGINE_POOL))}]"),
        "bytes_in_place": more.memory.alias_size_in_bytes,
        "bytes_held": sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(_state(2, small))),
        "host_callbacks": more.hlo.count("callback"),
    }


def llama_8b(layers: int, mesh: Mesh, *, small: bool) -> Decoder:
    """Return a Llama-3-8B of ``layers`` layers whose weights are shapes only; ``small``: in 4 bits."""
    config = DenseDecoder(
        vocab_size=VOCAB,
        hidden_size=4096,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        norm_eps=1e-5,
        max_position=8192,
        rope=RopeConfig(theta=500000.0),
        windows=(None,) * layers,
    ).model_config()
    decoder = abstract_decoder(config, jnp.dtype(jnp.bfloat16))
    if small:
        hold_quantized(decoder, llama.weights(config), TensorFiles({}), AWQ, mesh)
    return decoder


def _bank(config: ModelConfig, mesh: Mesh) -> AdapterBank:
    """Return a bank of ``ADAPTERS`` adapters of rank 16."""
    linears = adaptable(family_of({"architectures": ["LlamaForCausalLM"]}), config)
    return bank_of(config, linears, mesh, slots=ADAPTERS, max_rank=16, dtype=jnp.dtype(jnp.bfloat16))


def _state(layers: int, small: bool) -> DeviceState:
    """Return the state of an engine as shapes."""
    pool: Any = _pool_in_8_bits() if small else jax.ShapeDtypeStruct(ENGINE_POOL, jnp.bfloat16)
    token_buffer: Any = jax.ShapeDtypeStruct((SLOTS, SESSION_LEN), jnp.int32)
    return DeviceState((pool,) * layers, token_buffer)


def _engine_step(layers: int, shape: StepShape, *, small: bool, sampling: bool) -> Program:
    """The engine's step of ``shape``, compiled.

    ``small``: with weights in 4 bits and a KV cache in 8. ``sampling``: with the full sampler.
    """
    mesh = Mesh(np.array(offline_devices("h200")), ("tp",))
    model, state = llama_8b(layers, mesh, small=small), _state(layers, small)
    bank = _bank(model.config, mesh) if shape.adapted else None
    with jax.default_device(mesh.devices.flat[0]):
        plan = plan_steps(model, mesh, state.pools, [shape])
    program, weights = StepProgram.of(model, plan, bank)
    arrays = StepArrays(weights, adapters=() if bank is None else jax.eval_shape(bank.zeros))
    inputs = [jax.ShapeDtypeStruct((packed_size(shape),), jnp.int32)]
    if sampling:
        inputs.append(jax.eval_shape(lambda: padding_inputs(shape, VOCAB, full_sampler=True).constraints))
    options = LOOP_IN_GRAPH if shape.repeats > 1 else None
    step = partial(run_step, program, shape)
    return compile_for("h200", step, arrays, state, *inputs, donate=(1,), options=options)


def _pool_in_8_bits() -> QuantizedPool:
    *heads, block_size, _ = ENGINE_POOL
    values: Any = jax.ShapeDtypeStruct(ENGINE_POOL, jnp.uint8)
    scales: Any = jax.ShapeDtypeStruct((*heads, 2, block_size), jnp.float16)
    return QuantizedPool(values, scales)
