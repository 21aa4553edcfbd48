"""What the programs of ``static_programs.py`` are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

INSTRUCTIONS = {
    ("w4a16_matmul", "decode", None): 3.2,
    ("paged_attention", "decode", "bf16"): 3.3,
    ("paged_attention", "decode", "int8"): 7.0,
}
"""Most instructions per element, on an H200 for shapes with ``bar``: (op, phase, kv) → limit."""

LAUNCHES_PER_LAYER = {1: 7, 8: 13}
"""Most launches of a decode step's layer, collectives included: tp → limit."""

ENGINE_LAUNCHES = {"decode": LAUNCHES_PER_LAYER[1], "verify": 13, "adapted decode": 21}
"""The same for the engine's steps, by how their names begin; guesses and adapters go op by op."""

STEP_TEMP_BYTES = 16 * 10**6


def bars() -> dict[str, Any]:
    """All of them, for the record."""
    return {
        "instructions_per_element": {"/".join(filter(None, key)): limit for key, limit in INSTRUCTIONS.items()},
        "launches_per_layer": {f"tp{tp}": limit for tp, limit in LAUNCHES_PER_LAYER.items()},
        "step_temp_bytes": STEP_TEMP_BYTES,
    }


def failures(
    kernels: list[dict[str, Any]], steps: list[dict[str, Any]], engine: list[dict[str, Any]] | None = None
) -> list[str]:
    """What breaks a bar, one line each."""
    lines = []
    for kernel in kernels:
        name = f"{kernel.get('kernel', kernel['op'])} {kernel['backend']} {kernel['shape']} on {kernel['device']}"
        if "error" in kernel:
            lines.append(f"{name}: {kernel['error']}")
        elif "refused" not in kernel:
            lines += [f"{name}: {fault}" for fault in _kernel_faults(kernel)]
    for step in steps:
        lines += [f"decode step, tp={step['tp']}, jax {step['jax']}: {fault}" for fault in _step_faults(step)]
    for step in engine or []:
        name = f"engine's {step['step']} step, {step['weights']} weights, {step['kv']} KV, jax {step['jax']}"
        lines += [f"{name}: {fault}" for fault in _engine_faults(step)]
    return lines


def _kernel_faults(kernel: dict[str, Any]) -> Iterator[str]:
    if kernel["spills"]:
        yield f"{kernel['spills']} bytes of registers spilled; the bar is 0"
    if kernel["op"] == "w4a16_matmul" and kernel["temp_bytes"] > kernel["argument_bytes"] / 2:
        yield f"{kernel['temp_bytes']} bytes of temporaries beside {kernel['argument_bytes']} of arguments"
    limit = INSTRUCTIONS.get((kernel["op"], kernel["phase"], kernel["kv"]))
    held = kernel["bar"] and kernel["device"] == "h200" and kernel["kernel"] == kernel["op"]
    if held and limit is not None and not (kernel["instructions_per_element"] or math.inf) <= limit:
        yield f"{kernel['instructions_per_element']} instructions per element; the bar is {limit}"


def _step_faults(step: dict[str, Any]) -> Iterator[str]:
    limit = LAUNCHES_PER_LAYER[step["tp"]]
    if step["launches_per_layer"] > limit:
        yield f"{step['launches_per_layer']} launches a layer; the bar is {limit}"
    if step["tp"] == 1 and step["command_buffers"] != 1:
        yield f"{step['command_buffers']} top-level CUDA graphs; the bar is 1"
    if step["tp"] == 1 and step["outside_command_buffers"]:
        yield f"{step['outside_command_buffers']} launches outside the CUDA graph; the bar is 0"
    if step["temp_bytes"] > STEP_TEMP_BYTES:
        yield f"{step['temp_bytes']} bytes of temporaries; the bar is {STEP_TEMP_BYTES}"
    for what in ("pool_copies", "weight_copies"):
        if step[what]:
            yield f"{step[what]} {what.replace('_', ' ')}; the bar is 0"


def _engine_faults(step: dict[str, Any]) -> Iterator[str]:
    if step["pool_copies"]:
        yield f"{step['pool_copies']} pool copies; the bar is 0"
    if step["command_buffers"] != 1 or step["outside_command_buffers"]:
        found = f"{step['command_buffers']} CUDA graphs and {step['outside_command_buffers']} launches outside"
        yield f"{found}; the bar is one graph of all"
    if step["bytes_in_place"] != step["bytes_held"]:
        yield f"{step['bytes_in_place']} bytes updated in place; the bar is all {step['bytes_held']}"
    if step["host_callbacks"]:
        yield f"{step['host_callbacks']} calls of the host; the bar is 0"
    limit = next((most for name, most in ENGINE_LAUNCHES.items() if step["step"].startswith(name)), math.inf)
    if step["launches_per_layer"] > limit:
        yield f"{step['launches_per_layer']} launches a layer; the bar is {limit}"
