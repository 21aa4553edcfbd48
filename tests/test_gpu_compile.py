"""The static check: what it compiles, and what it holds against its bars."""

from __future__ import annotations

from typing import Any

import pytest
from static_bars import failures
from static_programs import entries

from pallas_kernels.dispatch import OPS

KERNEL = {
    "op": "w4a16_matmul",
    "kernel": "w4a16_matmul",
    "backend": "pallas_triton",
    "phase": "decode",
    "kv": None,
    "shape": "S",
    "bar": True,
    "device": "h200",
    "spills": 0,
    "instructions_per_element": 3.2,
    "temp_bytes": 10,
    "argument_bytes": 100,
}
STEP = {
    "jax": "0.10.2",
    "tp": 1,
    "launches_per_layer": 7,
    "command_buffers": 1,
    "outside_command_buffers": 0,
    "temp_bytes": 16_000_000,
    "pool_copies": 0,
    "weight_copies": 0,
}


def test_bars_that_are_just_reached_hold() -> None:
    assert failures([KERNEL, {**KERNEL, "refused": "needs sm_90"}], [STEP]) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"spills": 8}, "8 bytes of registers spilled; the bar is 0"),
        ({"instructions_per_element": 3.21}, "3.21 instructions per element; the bar is 3.2"),
        ({"instructions_per_element": None}, "None instructions per element; the bar is 3.2"),
        ({"temp_bytes": 51}, "51 bytes of temporaries beside 100 of arguments"),
        ({"error": "Boom: no"}, "Boom: no"),
    ],
)
def test_a_kernel_that_breaks_a_bar(change: dict[str, Any], line: str) -> None:
    assert failures([{**KERNEL, **change}], []) == [f"w4a16_matmul pallas_triton S on h200: {line}"]


def test_instructions_have_a_bar_for_marked_shapes_on_an_h200_alone() -> None:
    many = {"instructions_per_element": 99.0}
    kernels = [{**KERNEL, **many, "bar": False}, {**KERNEL, **many, "device": "a100"}]
    assert failures(kernels, []) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"launches_per_layer": 7.1}, "7.1 launches a layer; the bar is 7"),
        ({"tp": 8, "launches_per_layer": 14}, "14 launches a layer; the bar is 13"),
        ({"command_buffers": 2}, "2 top-level CUDA graphs; the bar is 1"),
        ({"outside_command_buffers": 1}, "1 launches outside the CUDA graph; the bar is 0"),
        ({"temp_bytes": 16_000_001}, "16000001 bytes of temporaries; the bar is 16000000"),
        ({"pool_copies": 1}, "1 pool copies; the bar is 0"),
        ({"weight_copies": 2}, "2 weight copies; the bar is 0"),
    ],
)
def test_a_step_that_breaks_a_bar(change: dict[str, Any], line: str) -> None:
    step = {**STEP, **change}
    assert failures([], [step]) == [f"decode step, tp={step['tp']}, jax 0.10.2: {line}"]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"step": "mixed", "launches_per_layer": 20.0}, []),
        ({"launches_per_layer": 7.5}, ["7.5 launches a layer; the bar is 7"]),
        ({"pool_copies": 2}, ["2 pool copies; the bar is 0"]),
        ({"outside_command_buffers": 3}, ["1 CUDA graphs and 3 launches outside; the bar is one graph of all"]),
        ({"step": "decode in a row", "launches_per_layer": 8.0}, ["8.0 launches a layer; the bar is 7"]),
        ({"step": "verify", "launches_per_layer": 14}, ["14 launches a layer; the bar is 13"]),
        ({"step": "adapted decode", "launches_per_layer": 21}, []),
        ({"bytes_in_place": 9}, ["9 bytes updated in place; the bar is all 10"]),
        ({"host_callbacks": 1}, ["1 calls of the host; the bar is 0"]),
    ],
)
def test_a_step_of_the_engine(change: dict[str, Any], lines: list[str]) -> None:
    of_the_engine = {"weights": "W4A16", "kv": "int8", "bytes_in_place": 10, "bytes_held": 10, "host_callbacks": 0}
    step = {**STEP, "step": "decode", **of_the_engine, **change}
    found = failures([], [], [step])
    assert found == [f"engine's {step['step']} step, W4A16 weights, int8 KV, jax 0.10.2: {line}" for line in lines]


def test_every_pallas_backend_is_compiled_in_every_phase() -> None:
    h200, a100 = (list(entries(device)) for device in ("h200", "a100"))
    assert {entry.op for entry in a100} == set(OPS)
    assert {("w4a16_matmul", "prefill", None), ("paged_attention", "decode", "int4")} <= {
        (entry.op, entry.phase, entry.kv) for entry in a100
    }
    marked = [entry for entry in h200 if entry.shape.bar and entry.backend == "pallas_triton"]
    linears = [entry for entry in marked if entry.op == "w4a16_matmul"]
    assert {(entry.shape.m, entry.shape.k, entry.shape.n) for entry in linears} >= {
        (m, k, n) for m in (1, 16) for k, n in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
    }
    assert {entry.kv for entry in marked if entry.op == "paged_attention"} >= {"bf16", "int8"}
