#!/usr/bin/env python
"""What prefix caching saves: one system prompt before many questions, and conversations that grow.

Two engines over the same random weights, one of them without the cache, do the same work in turn, on tokens that are
new in every round; medians are compared.

    python scripts/bench_prefix_cache.py --out benchmarks/results/prefix_cache_cpu.json --plot prefix_cache.png
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_generation import SHAPES, write_shape
from bench_record import picture_path, result_path, save_figure, spread, write_result
from tqdm import tqdm

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.messages import Request, SamplingParams

SYSTEMS = {"cache on": True, "cache off": False}
Tokens = list[int]
Figures = dict[str, list[float]]


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    vocab = SHAPES[args.shape]["vocab_size"]
    figures: dict[str, Figures] = {name: {} for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as scratch:
        engines = {name: engine(Path(scratch), args, sharing) for name, sharing in SYSTEMS.items()}
        for round_ in tqdm(range(args.rounds + 1), desc="rounds"):
            for name in SYSTEMS:
                random = np.random.default_rng(round_)  # the same for both systems
                measured = dict(run_round(engines[name], random, vocab, args))
                if round_:
                    for figure, seconds in measured.items():
                        figures[name].setdefault(figure, []).append(seconds)
    metrics = {name: {figure: spread(values) for figure, values in by.items()} for name, by in figures.items()}
    ratios = {
        f"cache off / on: {figure}": round(metrics["cache off"][figure]["p50"] / metrics["cache on"][figure]["p50"], 3)
        for figure in metrics["cache on"]
    }
    report(metrics, ratios)
    if args.out:
        config = {key: value for key, value in vars(args).items() if key not in ("out", "plot")}
        write_result(args.out, "prefix_cache/1", config, metrics, ratios)
    if args.plot:
        draw(metrics, args.turns, args.plot)


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--system-len", type=int, default=512, help="tokens of the system prompt that all share")
    parser.add_argument("--requests", type=int, default=32, help="questions behind it")
    parser.add_argument("--turns", type=int, default=8, help="turns of the conversation")
    parser.add_argument("--turn-len", type=int, default=64, help="tokens of a question; the reply has as many")
    parser.add_argument("--new", type=int, default=16, help="tokens of a reply to one of the many questions")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--session-len", type=int, default=1024)
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    parser.add_argument("--plot", type=picture_path, help="PNG file to write")
    return parser.parse_args()


def engine(folder: Path, args: argparse.Namespace, sharing: bool) -> Engine:
    """One over random weights, warmed up."""
    write_shape(folder, args.shape, args.session_len)
    config = EngineConfig(
        dtype=args.dtype,
        load_format="dummy",
        session_len=args.session_len,
        max_batch_size=args.max_batch_size,
        enable_prefix_caching=sharing,
    )
    return build_engine(folder, read_hf_config(folder), config, progress=True)


def run_round(
    running: Engine, random: np.random.Generator, vocab: int, args: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Seconds of all questions behind one system prompt, and to the first token of every turn of a conversation."""

    def drawn(count: int) -> Tokens:
        tokens: Tokens = random.integers(3, vocab, count).tolist()
        return tokens

    system = drawn(args.system_len)
    _, total, _ = timed(running, [system + drawn(args.turn_len) for _ in range(args.requests)], args.new)
    yield f"{args.requests} requests behind {args.system_len} tokens, s", total
    said: Tokens = []
    for turn in range(1, args.turns + 1):
        first, _, (reply,) = timed(running, [said + drawn(args.turn_len)], args.turn_len)
        said = reply
        yield f"ttft of turn {turn}, s", first


def timed(running: Engine, prompts: Sequence[Tokens], new: int) -> tuple[float, float, list[Tokens]]:
    """Seconds to the first token and to the last, and each prompt with its reply."""
    texts = {str(index): list(prompt) for index, prompt in enumerate(prompts)}
    start = time.perf_counter()
    for name, tokens in texts.items():
        running.add(Request(name, tuple(tokens), SamplingParams(max_new_tokens=new)))
    first = 0.0
    while running.has_work:
        for output in running.step():
            first = first or time.perf_counter() - start
            texts[output.request_id] += output.token_ids
    return first, time.perf_counter() - start, list(texts.values())


def report(metrics: Mapping[str, Any], ratios: Mapping[str, float]) -> None:
    """Print the medians as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *SYSTEMS, "off / on")
    for figure in metrics["cache on"]:
        medians = [f"{metrics[name][figure]['p50']:.3f}" for name in SYSTEMS]
        table.add_row(figure, *medians, f"{ratios[f'cache off / on: {figure}']:.2f}")
    Console().print(table)


def draw(metrics: Mapping[str, Any], turns: int, path: Path) -> None:
    """Write a plot of the time to the first token over the turns of a conversation."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, color in zip(SYSTEMS, ("#2563eb", "#94a3b8"), strict=True):
        seconds = [metrics[name][f"ttft of turn {turn}, s"]["p50"] for turn in range(1, turns + 1)]
        axes.plot(range(1, turns + 1), seconds, "o-", color=color)
        axes.annotate(name, (turns, seconds[-1]), (8, 0), textcoords="offset points", va="center", color=color)
    axes.set_xticks(range(1, turns + 1))
    axes.set(xlabel="turn", ylim=(0, None), xlim=(0.7, turns + 1.4))
    axes.set_title("Seconds to the first token of a reply", loc="left", fontsize=11, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
