#!/usr/bin/env python
"""What it costs the host to launch a decode step of a Llama-3-8B in W4A16: its real arguments, each of one element.

The program hands its state on and computes nothing else, so what is left is JAX's own work for every launch.

    python scripts/bench_dispatch.py --out benchmarks/results/dispatch_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_record import result_path, write_result
from rich.console import Console
from static_programs import SLOTS, STEP_BATCH, TABLE_LENGTH, llama_8b

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.inputs import packed_size
from jaxdeploy.engine.device.step import DeviceState, StepArrays
from jaxdeploy.engine.device.step_weights import flatten
from jaxdeploy.parallel.mesh import make_mesh

LAYERS = 32


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=2000, help="timed launches (default: 2000)")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    args = parser.parse_args()
    _, weights = flatten(llama_8b(LAYERS, make_mesh(1), small=True), make_mesh(1))
    leaves = tuple(jnp.zeros((1,), leaf.dtype) for leaf in weights)
    seconds = time_launches(leaves, args.launches)
    metrics: dict[str, Any] = {
        "weights": len(leaves),
        "pools": LAYERS,
        "launch_us": {"p50": round(1e6 * statistics.median(seconds), 1), "min": round(1e6 * min(seconds), 1)},
    }
    Console().print(metrics)
    if args.out:
        config = {"launches": args.launches, "layers": LAYERS, "batch": STEP_BATCH}
        write_result(args.out, "dispatch/1", config, metrics, {"launch_us": metrics["launch_us"]["p50"]})


def time_launches(leaves: tuple[jax.Array, ...], count: int) -> list[float]:
    """Seconds that each of ``count`` launches keeps the host, with what the device does awaited in between."""
    step = jax.jit(_hand_on, donate_argnums=1, keep_unused=True)
    packed = np.zeros(packed_size(StepShape(STEP_BATCH, 0, TABLE_LENGTH, SLOTS)), np.int32)
    pools = tuple(jnp.zeros((1,), jnp.bfloat16) for _ in range(LAYERS))
    arrays, state = StepArrays(leaves), DeviceState(pools, jnp.zeros((1,), jnp.int32))
    seconds = []
    for _ in range(count + 100):
        start = time.perf_counter()
        tokens, state = step(arrays, state, packed)
        seconds.append(time.perf_counter() - start)
        jax.block_until_ready((tokens, state))
    return seconds[100:]


def _hand_on(arrays: StepArrays, state: DeviceState, packed: jax.Array) -> tuple[jax.Array, DeviceState]:
    return packed[:STEP_BATCH], state


if __name__ == "__main__":
    main()
