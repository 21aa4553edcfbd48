#!/usr/bin/env python
"""Where the time of a decode step goes: the host's parts, the device's ops, and a trace to look at in Perfetto.

The host schedules, builds and dispatches a step while the device runs the one before, so only what it does beyond that
keeps the device waiting; ``wait`` is the time in which it has nothing to do.

    python scripts/profile_step.py --batch 64 --trace step.json.gz
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_generation import SHAPES, write_shape
from bench_record import result_path, spread, write_result
from tqdm import tqdm

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.messages import Request, SamplingParams

HOST = ("schedule", "admit", "build", "dispatch", "commit")
BUSY = ("schedule", "build", "dispatch")
"""Parts that must be over before a step can start."""
TRACED = 4
"""Steps in the trace."""
NO_OPS = re.compile(r"Threadpool|ThreadPool|^end: |^Task |^\$|Execute|Await|::")
"""What a profiler notes on the device's threads of a CPU beside the ops."""


def main() -> None:
    """Run the profile."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model or scratch)
        if args.model is None:
            write_shape(folder, args.shape, args.session_len)
        engine = decoding_engine(folder, args)
        parts = host_parts(engine, args.steps)
        ops = device_ops(engine, Path(scratch), args.trace)
    metrics = {
        "host_ms": {name: spread(1e3 * value for value in parts[name]) for name in (*HOST, "wait", "step")},
        "host_busy_ms": spread(1e3 * sum(each) for each in zip(*(parts[name] for name in BUSY), strict=True)),
        "device_ms": {name: round(milliseconds, 4) for name, milliseconds in list(ops.items())[: args.top]},
    }
    busy, step = metrics["host_busy_ms"]["p50"], metrics["host_ms"]["step"]["p50"]
    report(metrics, sum(ops.values()))
    if args.out:
        config = {key: value for key, value in vars(args).items() if key not in ("out", "trace")}
        write_result(args.out, "profile_step/1", config, metrics, {"host busy / step": round(busy / step, 5)})


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder of a checkpoint; only its config.json is used, weights are random")
    model.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--batch", type=int, default=64, help="sequences that decode (default: 64)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each before that (default: 64)")
    parser.add_argument("--steps", type=int, default=50, help="timed steps (default: 50)")
    parser.add_argument("--session-len", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--top", type=int, default=12, help="ops to list (default: 12)")
    parser.add_argument("--trace", help="trace file to write, .json.gz; open it at ui.perfetto.dev")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    return parser.parse_args()


def decoding_engine(folder: Path, args: argparse.Namespace) -> Engine:
    """An engine in which ``--batch`` sequences decode for as long as is needed."""
    config = EngineConfig(
        dtype=args.dtype,
        load_format="dummy",
        session_len=args.session_len,
        max_batch_size=args.batch,
        warmup=False,
    )
    engine = build_engine(folder, read_hf_config(folder), config, progress=True)
    random = np.random.default_rng(0)
    for index in range(args.batch):
        tokens = random.integers(3, read_hf_config(folder)["vocab_size"], args.prompt).tolist()
        engine.add(Request(str(index), tuple(tokens), SamplingParams(max_new_tokens=args.session_len)))
    began: set[str] = set()
    while len(began) < args.batch:
        began |= {output.request_id for output in engine.step()}
    for _ in range(4):  # into steps of nothing but decodes, compiled
        engine.step()
    return engine


def host_parts(engine: Engine, steps: int) -> Mapping[str, list[float]]:
    """Seconds of every part of ``steps`` steps, and of the whole as ``step``."""
    parts: dict[str, list[float]] = {name: [] for name in (*HOST, "wait", "step")}
    engine.spans.listener = lambda name, seconds: parts[name].append(seconds)
    for _ in tqdm(range(steps), desc="steps"):
        with engine.spans("step"):
            engine.step()
    engine.spans.listener = None
    return parts


def device_ops(engine: Engine, scratch: Path, trace: str | None) -> dict[str, float]:
    """Milliseconds a step by kind of op, summed over the device's threads or streams; writes the trace."""
    with jax.profiler.trace(str(scratch / "trace"), create_perfetto_trace=True):
        for _ in range(TRACED):
            with engine.spans("step"):
                engine.step()
    (folder,) = (scratch / "trace/plugins/profile").iterdir()
    if trace:
        shutil.copy(folder / "perfetto_trace.json.gz", trace)
    (profile,) = folder.glob("*.xplane.pb")
    ops: dict[str, float] = defaultdict(float)
    for name, nanoseconds in device_events(jax.profiler.ProfileData.from_file(str(profile))):
        ops[re.sub(r"[.\d]+$", "", name)] += nanoseconds / 1e6 / TRACED
    return dict(sorted(ops.items(), key=lambda item: -item[1]))


def device_events(profile: Any) -> Iterator[tuple[str, float]]:
    """Name and nanoseconds of what ran on devices: their streams, or the threads of a CPU's."""
    for plane in profile.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:") or line.name.startswith("tf_XLA"):
                yield from ((event.name, event.duration_ns) for event in line.events if not NO_OPS.search(event.name))


def report(metrics: Mapping[str, Any], on_device: float) -> None:
    """Print where the time goes."""
    from rich.console import Console
    from rich.table import Table

    host = Table("host, ms a step", "median", "max")
    for name, values in metrics["host_ms"].items():
        host.add_row(name, f"{values['p50']:.3f}", f"{values['max']:.3f}")
    host.add_row(" + ".join(BUSY), f"{metrics['host_busy_ms']['p50']:.3f}", f"{metrics['host_busy_ms']['max']:.3f}")
    device = Table("device, ms a step (all threads or streams)", "sum", "share")
    for name, milliseconds in metrics["device_ms"].items():
        device.add_row(name, f"{milliseconds:.3f}", f"{milliseconds / on_device:.1%}")
    Console().print(host, device)


if __name__ == "__main__":
    main()
