#!/usr/bin/env python
"""What the engine shall reach on an H200, held against what ``scripts/gpu_suite --end-to-end``, ``--features`` wrote.

python scripts/end_to_end_goals.py benchmarks/results NVIDIA_H200
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kernel_goals import Goal
from rich.console import Console
from rich.table import Table

DECODE = "1x(128,256)"
LONG = "1x(32000,2)"
BF16 = "jaxdeploy llama-8b"
PUBLISHED = {"SGLang": 16215, "LMDeploy": 16132, "vLLM": 12553}
"""Output tokens/s of Llama-3.1-8B in bf16 on an H100 with 1000 ShareGPT prompts, as published by aimultiple."""

FILES = ("generation", "throughput", "throughput_int8", "peers", "speculation", "adapters")

Results = Mapping[str, Any]
"""Name in ``FILES`` → a file's content, empty where it was not written."""


def main() -> None:
    """Print every goal and what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the results are")
    parser.add_argument("device", help="what their names end with")
    args = parser.parse_args()
    results = {name: read(args.folder / f"{name}_{args.device}.json") for name in FILES}
    table = Table("goal", "at least", "is", "verdict")
    for goal in goals(results):
        table.add_row(goal.name, f"{goal.bar:.2f}", "" if goal.value is None else f"{goal.value:.2f}", goal.verdict)
    console = Console(width=120)
    console.print(table)
    ours = value(lambda: results["throughput"]["metrics"]["jaxdeploy"]["output_tok_s"]["p50"])
    prefill = value(lambda: shares(results["generation"], BF16)[f"operations of matmul rate {LONG}"])
    console.print(f"prefill of 32000 tokens, bf16: {prefill} of the matmul rate")
    beside = ", ".join(f"{name} {rate}" for name, rate in PUBLISHED.items())
    console.print(f"output tokens/s of 256 x (1024, 256): {ours}; published, for other lengths on an H100: {beside}")


def read(path: Path) -> dict[str, Any]:
    """A result file's content."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def goals(results: Results) -> Iterator[Goal]:
    """Every goal, with its value where the results have what it needs."""
    generation, bf16 = results["generation"], BF16
    rate = f"decode_tok_s {DECODE}"
    share = f"weights of copy bandwidth {DECODE}"
    yield Goal("decode, batch 1: W4A16 / bf16", 2.4, value(lambda: generation["ratios"][f"{rate} vs {bf16}"]))
    yield Goal("  W4A16, share of the floor", 0.6, value(lambda: shares(generation, "jaxdeploy")[share]))
    yield Goal("  bf16, share of the floor", 0.75, value(lambda: shares(generation, bf16)[share]))
    yield Goal(
        "  W4A16 / transformers compiled, bf16",
        2.4,
        value(lambda: generation["metrics"]["jaxdeploy"][rate]["p50"] / peer(results, "decode_static_compiled")),
    )
    yield Goal(
        "256 x (1024, 256) / transformers continuous",
        2.0,
        value(lambda: throughput(results["throughput"]) / peer(results, "continuous_batching")),
    )
    yield Goal(
        "  tokens that KV int8 holds / bf16",
        1.9,
        value(lambda: kv_tokens(results["throughput_int8"]) / kv_tokens(results["throughput"])),
    )
    yield Goal(
        "copying a text, batch 1: guesses on / off",
        1.8,
        value(lambda: results["speculation"]["ratios"]["copy tok_s, on / off"]),
    )
    yield Goal(
        "  a draft that is always wrong: on / off",
        0.95,
        value(lambda: results["speculation"]["ratios"]["draft tok_s, on / off"]),
    )
    yield Goal(
        "64 requests over 16 adapters of rank 16 / without",
        0.85,
        value(lambda: results["adapters"]["ratios"]["adapters / base"]),
    )


def value(find: Callable[[], float]) -> float | None:
    """What ``find`` finds, ``None`` where it was not measured."""
    try:
        return find()
    except KeyError:
        return None


def shares(generation: Results, system: str) -> Mapping[str, float]:
    """How near a system of ours came to what the device can do."""
    found: Mapping[str, float] = generation["metrics"][system]["share_of_ceilings"]
    return found


def throughput(result: Results) -> float:
    """Output tokens/s."""
    return float(result["metrics"]["jaxdeploy"]["output_tok_s"]["p50"])


def kv_tokens(result: Results) -> int:
    """Tokens that the KV cache has room for."""
    return int(result["metrics"]["kv_tokens"])


def peer(results: Results, name: str) -> float:
    """Tokens/s of transformers' way ``name``. Raises ``KeyError`` where it did not run."""
    for row in results["peers"].get("metrics", ()):
        if row["name"] == name and row.get("tok_s"):
            return float(row["tok_s"])
    raise KeyError(name)


if __name__ == "__main__":
    main()
