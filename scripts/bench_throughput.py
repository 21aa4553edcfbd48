#!/usr/bin/env python
"""Throughput of many requests of different lengths: ours alone or beside transformers in the same run.

Lengths come from a request trace (CSV with ContextTokens and GeneratedTokens), or prompts and reply lengths from a file
in ShareGPT's form. Every request gets exactly its number of tokens (``ignore_eos``). All are asked for at once unless
``--arrivals`` keeps the trace's times.

    python scripts/bench_throughput.py trace.csv --prompt-scale 0.0625 --compare transformers --plot throughput.png
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench_generation import PAUSE, SHAPES, generate_at, transformers_model, write_shape
from bench_record import picture_path, result_path, save_figure, spread, write_result
from tqdm import tqdm

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.errors import ConfigError
from jaxdeploy.messages import Request, SamplingParams

STATIC, CONTINUOUS = "transformers, static batches", "transformers, continuous"
OURS = "jaxdeploy"
COLORS = {OURS: "#2563eb", STATIC: "#94a3b8", CONTINUOUS: "#d97706"}


@dataclass(frozen=True)
class Job:
    """A request: its prompt, the tokens it gets, and the seconds after the first one at which it comes."""

    prompt: tuple[int, ...]
    new: int
    comes: float = 0.0


@dataclass
class Ride:
    """One run of all jobs. ``tokens``: seconds since the start at which a job got tokens, and how many, by job."""

    seconds: float = 0.0
    tokens: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def note(self, job: int, when: float, count: int) -> None:
        """Job number ``job`` has ``count`` more tokens."""
        self.tokens.setdefault(job, []).append((when, count))

    @property
    def output(self) -> int:
        """Tokens that were delivered."""
        return sum(count for events in self.tokens.values() for _, count in events)


System = Callable[[Sequence[Job]], Ride]


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model or scratch)
        if args.model is None:
            write_shape(folder, args.shape, args.session_len)
        jobs = read_jobs(args, read_hf_config(folder)["vocab_size"])
        engine = build(folder, args)
        systems: dict[str, System] = {OURS: partial(ours, engine)}
        if args.compare:
            systems |= transformers(folder, args)
        rides = measure(systems, jobs, args.rounds)
    metrics: dict[str, Any] = {name: summary(jobs, each) for name, each in rides.items()}
    metrics["work"] = work(jobs)
    metrics["kv_tokens"] = engine.stats.blocks * engine.scheduler.limits.block_size
    ratios = {
        f"output_tok_s vs {name}": round(metrics[OURS]["output_tok_s"]["p50"] / metrics[name]["output_tok_s"]["p50"], 3)
        for name in rides
        if name != OURS
    }
    report(metrics, rides)
    if args.out:
        config = {key: value for key, value in vars(args).items() if key not in ("out", "plot", "file")}
        write_result(args.out, "throughput/1", {**config, "file": Path(args.file).name}, metrics, ratios)
    if args.plot:
        draw(rides, args.plot)


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", help="trace (.csv), conversations in ShareGPT's form (.json), or lengths for all: 1024+256"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder with config.json and, for texts, a tokenizer; weights are random")
    model.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--num-prompts", type=int, default=64, help="requests, the first of the file (default: 64)")
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="prompts of a trace times this, e.g. 0.0625")
    parser.add_argument("--arrivals", action="store_true", help="requests come when the trace says, not all at once")
    parser.add_argument("--concurrency", type=int, default=8, help="sequences that run at a time (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--dtype", default="auto", help="dtype of ours; transformers runs float32")
    parser.add_argument("--session-len", type=int, default=1024)
    parser.add_argument(
        "--compile-all",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile all steps first, not only those that the round before the timed ones takes (default: yes)",
    )
    parser.add_argument("--quant-policy", type=int, default=0, help="KV cache of ours: 0, 8 or 4")
    parser.add_argument("--compare", choices=("transformers",), help="run this beside ours ([parity] extra)")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    parser.add_argument("--plot", type=picture_path, help="PNG file to write")
    return parser.parse_args()


def read_jobs(args: argparse.Namespace, vocab: int) -> list[Job]:
    """The first ``--num-prompts`` requests of the file that fit into ``--session-len``."""
    if re.fullmatch(r"\d+\+\d+", args.file):
        read = equal_lengths
    else:
        read = read_conversations if args.file.endswith(".json") else read_trace
    jobs = [job for job in read(args, vocab) if len(job.prompt) + job.new <= args.session_len][: args.num_prompts]
    if not jobs:
        raise ConfigError(f"{args.file}: has no request of at most session_len={args.session_len} tokens; raise it")
    return [replace(job, comes=job.comes * args.arrivals) for job in jobs]


def equal_lengths(args: argparse.Namespace, vocab: int) -> Iterator[Job]:
    """Random prompts of one length, and replies of one length."""
    random = np.random.default_rng(0)
    prompt, new = map(int, args.file.split("+"))
    for _ in range(args.num_prompts):
        yield Job(tuple(random.integers(3, vocab, prompt).tolist()), new)


def read_trace(args: argparse.Namespace, vocab: int) -> Iterator[Job]:
    """Requests of a trace like Azure's, with random tokens."""
    random = np.random.default_rng(0)
    with Path(args.file).open(newline="") as lines:
        first = None
        for row in csv.DictReader(lines):
            time_ = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            first = first or time_
            length = max(int(int(row["ContextTokens"]) * args.prompt_scale), 1)
            prompt = random.integers(3, vocab, length).tolist()
            yield Job(tuple(prompt), int(row["GeneratedTokens"]), time_ - first)


def read_conversations(args: argparse.Namespace, vocab: int) -> Iterator[Job]:
    """First question and length of the first answer of each conversation, as LMDeploy's benchmark takes them."""
    from jaxdeploy.tokenizer import Tokenizer

    if args.model is None:
        raise ConfigError("--model must name a checkpoint for texts; give one with a tokenizer, or a trace")
    tokenizer = Tokenizer.load(Path(args.model))
    for talk in json.loads(Path(args.file).read_text()):
        turns = [turn["value"] for turn in talk.get("conversations", ())]
        if len(turns) >= 2:
            prompt, reply = tokenizer.encode(turns[0]), tokenizer.encode(turns[1], add_bos=False)
            if len(prompt) >= 4 and len(reply) >= 4:
                yield Job(tuple(prompt), len(reply))


def build(folder: Path, args: argparse.Namespace) -> Engine:
    """Our engine."""
    config = EngineConfig(
        dtype=args.dtype,
        load_format="dummy",
        session_len=args.session_len,
        max_batch_size=args.concurrency,
        quant_policy=args.quant_policy,
        enable_prefix_caching=False,  # every round asks the same
        warmup=args.compile_all,
    )
    return build_engine(folder, read_hf_config(folder), config, progress=True)


def ours(engine: Engine, jobs: Sequence[Job]) -> Ride:
    """All jobs through our engine."""
    ride, coming, start = Ride(), list(enumerate(jobs)), time.perf_counter()
    while coming or engine.has_work:
        while coming and coming[0][1].comes <= time.perf_counter() - start:
            index, job = coming.pop(0)
            engine.add(Request(str(index), job.prompt, SamplingParams(max_new_tokens=job.new)))
        for output in engine.step():
            ride.note(int(output.request_id), time.perf_counter() - start, len(output.token_ids))
    ride.seconds = time.perf_counter() - start
    return ride


def transformers(folder: Path, args: argparse.Namespace) -> dict[str, System]:
    """A float32 model with random weights: ``generate`` on batches in order of arrival, and its continuous batching."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = transformers_model(folder)

    def static(jobs: Sequence[Job]) -> Ride:
        ride, start = Ride(), time.perf_counter()
        for first in range(0, len(jobs), args.concurrency):
            group = jobs[first : first + args.concurrency]
            longest = max(len(job.prompt) for job in group)
            ids = torch.tensor([[0] * (longest - len(job.prompt)) + list(job.prompt) for job in group])
            mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in group])
            times = generate_at(model, ids, mask, max(job.new for job in group))
            for index, job in enumerate(group, first):
                for when in times[: job.new]:
                    ride.note(index, when - start, 1)
        ride.seconds = time.perf_counter() - start
        return ride

    def continuous(jobs: Sequence[Job]) -> Ride:
        page = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
        batching = ContinuousBatchingConfig(
            num_blocks=args.concurrency * args.session_len // 256 + 1,
            max_batch_tokens=512,
            max_requests_per_batch=args.concurrency,
            allow_block_sharing=False,
            **{page: 256},
        )
        generation = GenerationConfig(
            max_new_tokens=max(job.new for job in jobs), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        usual = model.config._attn_implementation
        model.set_attn_implementation("paged|sdpa")
        manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
        ride = Ride()
        try:
            manager.warmup()
            manager.start()
            start = time.perf_counter()
            names = {manager.add_request(list(job.prompt), max_new_tokens=job.new): n for n, job in enumerate(jobs)}
            while len(ride.tokens) < len(jobs):
                result = manager.get_result(timeout=0.05)
                if result is not None and result.is_finished():
                    ride.note(names[result.request_id], time.perf_counter() - start, len(result.generated_tokens))
                if (fatal := manager.background_thread_status.fatal_error) is not None:
                    raise fatal
            ride.seconds = time.perf_counter() - start
        finally:
            manager.stop(block=True, timeout=20, hard_stop=True)
            model.set_attn_implementation(usual)
        return ride

    return {STATIC: static, CONTINUOUS: continuous}


def measure(systems: Mapping[str, System], jobs: Sequence[Job], rounds: int) -> dict[str, list[Ride]]:
    """All jobs on every system in turn; one round before the timed ones."""
    rides: dict[str, list[Ride]] = {name: [] for name in systems}
    with tqdm(total=(rounds + 1) * len(systems), desc="runs") as bar:
        for round_ in range(rounds + 1):
            for name, run in systems.items():
                time.sleep(PAUSE)
                bar.set_postfix_str(name)
                ride = run(jobs)
                if round_:
                    rides[name].append(ride)
                bar.update()
    return rides


def work(jobs: Sequence[Job]) -> dict[str, int]:
    """How much was asked for."""
    return {
        "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "output_tokens": sum(job.new for job in jobs),
    }


def summary(jobs: Sequence[Job], rides: Sequence[Ride]) -> dict[str, Any]:
    """Rates and waits of one system; the median ride's own percentiles, of tokens where it says when each came."""
    assert all(ride.output == sum(job.new for job in jobs) for ride in rides), "a system left tokens out"
    prompt = sum(len(job.prompt) for job in jobs)
    middle = sorted(rides, key=lambda ride: ride.seconds)[len(rides) // 2]
    first = [events[0][0] - jobs[job].comes for job, events in middle.tokens.items()]
    whole = [events[-1][0] - jobs[job].comes for job, events in middle.tokens.items()]
    gaps = [after[0] - before[0] for events in middle.tokens.values() for before, after in pairwise(events)]
    streamed = {"ttft_s": percentiles(first), "itl_s": percentiles(gaps)} if gaps else {}
    return {
        "output_tok_s": spread([ride.output / ride.seconds for ride in rides]),
        "total_tok_s": spread([(prompt + ride.output) / ride.seconds for ride in rides]),
        "seconds": spread([ride.seconds for ride in rides]),
        "latency_s": percentiles(whole),
        **streamed,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median and tail."""
    return {f"p{percent}": round(float(np.percentile(values, percent)), 4) for percent in (50, 90, 99)}


def report(metrics: Mapping[str, Any], rides: Mapping[str, Sequence[Ride]]) -> None:
    """Print the medians as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *rides)
    for name, part in (("output_tok_s", "p50"), ("total_tok_s", "p50"), ("seconds", "p50"), ("ttft_s", "p50"),
                       ("ttft_s", "p99"), ("itl_s", "p50"), ("itl_s", "p99"), ("latency_s", "p50")):  # fmt: skip
        cells = [metrics[system].get(name) for system in rides]
        table.add_row(f"{name} {part}", *("" if cell is None else f"{cell[part]:.3g}" for cell in cells))
    ours = metrics[OURS]["output_tok_s"]["p50"]
    table.add_row("ours / this", *(f"{ours / metrics[name]['output_tok_s']['p50']:.2f}" for name in rides))
    Console().print(table, metrics["work"])


def draw(rides: Mapping[str, Sequence[Ride]], path: Path) -> None:
    """Write a plot of the tokens delivered over time, of every system's median ride."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, each in rides.items():
        ride = sorted(each, key=lambda ride: ride.seconds)[len(each) // 2]
        events = sorted(event for events in ride.tokens.values() for event in events)
        times = [0.0, *(when for when, _ in events)]
        counts = np.cumsum([0, *(count for _, count in events)])
        axes.plot(times, counts, color=COLORS[name], label=name, drawstyle="steps-post")
    axes.set(xlabel="seconds", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("Output tokens delivered", loc="left", fontsize=11, weight="bold")
    axes.set(ylim=(0, None), xlim=(0, 1.25 * max(axes.dataLim.x1, 1)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
