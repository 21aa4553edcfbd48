#!/usr/bin/env python
"""The host's work in a decode step, with the shapes of an engine on a GPU and a device that computes nothing.

It times the choice of a bucket alone, and whole steps: schedule, pack, commit. Launching is in ``bench_dispatch.py``.

    python scripts/bench_host_step.py --out benchmarks/results/host_step_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from bench_record import result_path, write_result
from rich.console import Console

from jaxdeploy.engine.device.buckets import ROW_LENGTH, BucketTable, step_shapes
from jaxdeploy.engine.device.inputs import ModelInputs
from jaxdeploy.engine.device.packing import choose_bucket
from jaxdeploy.engine.device.sampler import Sampled
from jaxdeploy.engine.device.step import StepResult
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request, SamplingParams

LIMITS = SchedulerLimits(
    block_size=64,
    max_batch_size=128,
    max_prefill_tokens=8192,
    max_mixed_tokens=2048,
    row_length=ROW_LENGTH,
    session_len=8192,
)
"""Default sizes on a GPU."""
DRAFTS = 7
DECODES = (1, 64, 128)
PROMPT = 500
VOCAB = 128_256
PARTS = ("schedule", "build", "commit", "step")


class NoDevice:
    """A runner whose steps sample the token 1 at once."""

    weight_bytes = 0
    intact = True

    def run(self, inputs: ModelInputs) -> StepResult:
        """Return tokens that are on the host already."""
        return StepResult(Sampled(cast(Any, np.ones(inputs.shape.samples, np.int32))))

    def write_tokens(self, slot: int, token_ids: list[int]) -> None:
        """Keep nothing."""

    def copy_blocks(self, transfers: Any) -> None:
        """Copy nothing."""

    def upload(self, uploads: Any) -> None:
        """Copy nothing."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="timed steps (default: 500)")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    args = parser.parse_args()
    metrics: dict[str, Any] = {
        "bucket_us": {str(count): bucket_us(count, drafts=0) for count in DECODES},
        "bucket_with_drafts_us": {str(count): bucket_us(count, drafts=DRAFTS) for count in DECODES},
        "step_us": {str(count): step_us(count, args.steps) for count in DECODES},
    }
    Console().print(metrics)
    if args.out:
        config = {"steps": args.steps, "shapes": len(shapes(0)), "shapes_with_drafts": len(shapes(DRAFTS))}
        summary = {"bucket_us": metrics["bucket_us"]["128"], "step_us": metrics["step_us"]["128"]["step"]["p50"]}
        write_result(args.out, "host_step/1", config, metrics, summary)


def shapes(drafts: int) -> list[Any]:
    """The shapes of an engine."""
    return step_shapes(
        LIMITS.max_batch_size,
        LIMITS.max_prefill_tokens,
        LIMITS.max_mixed_tokens,
        LIMITS.blocks_for(LIMITS.session_len),
        drafts=drafts,
    )


def bucket_us(decodes: int, drafts: int) -> float:
    """Microseconds to choose the bucket of a batch of decodes."""
    buckets = BucketTable(shapes(drafts))
    chunks = tuple(Chunk(Sequence(Request("a", (1,))), 0, 1 + drafts, (1,) * drafts) for _ in range(decodes))
    batch = ScheduledBatch(chunks)
    return round(1e6 * _seconds(lambda: choose_bucket(buckets, batch)), 2)


def step_us(decodes: int, steps: int) -> dict[str, dict[str, float]]:
    """Microseconds of each part of a step in which ``decodes`` sequences decode."""
    engine = new_engine()
    for index in range(decodes):
        tokens = tuple(range(index, index + PROMPT))
        engine.add(Request(str(index), tokens, SamplingParams(max_new_tokens=LIMITS.session_len - PROMPT)))
    began: set[str] = set()
    while len(began) < decodes:
        began |= {output.request_id for output in engine.step()}
    parts: dict[str, list[float]] = {name: [] for name in (*PARTS, "admit", "dispatch", "wait")}
    engine.spans.listener = lambda name, seconds: parts[name].append(seconds)
    for _ in range(steps):
        with engine.spans("step"):
            engine.step()
    return {name: _median_and_min(parts[name]) for name in PARTS}


def new_engine() -> Engine:
    """An engine without a device, with blocks for whole sessions."""
    blocks = BlockManager(LIMITS.max_batch_size * LIMITS.blocks_for(LIMITS.session_len))
    scheduler = Scheduler(blocks, PrefixCache(blocks, LIMITS.block_size), LIMITS)
    return Engine(scheduler, cast(Any, NoDevice()), shapes(0), VOCAB)


def _median_and_min(seconds: list[float]) -> dict[str, float]:
    """Microseconds; the rest is noise of the machine."""
    return {"p50": round(1e6 * statistics.median(seconds), 1), "min": round(1e6 * min(seconds), 1)}


def _seconds(work: Callable[[], Any], repeat: int = 200) -> float:
    """The median time of one call."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
