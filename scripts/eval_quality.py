#!/usr/bin/env python
"""Compare checkpoints of one model on a text: perplexity, distance from the first of them, and size.

The first is the reference, with a float KV cache. One model is in memory at a time, beside the reference's head.

    python scripts/eval_quality.py jaxdeploy/demo ./demo-awq ./demo-gptq --plot quality.png
    python scripts/eval_quality.py jaxdeploy/demo --quant-policy 0 8 4 --text book.txt --json quality.json
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_record import picture_path, save_figure, write_result
from eval_ppl import KV_CACHES, add_shared_arguments, label, load, one_line_errors, read_text, settings
from rich.console import Console
from rich.table import Table

from jaxdeploy.checkpoint.source import resolve_model
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.compress.calibration import Calibration
from jaxdeploy.compress.evaluate import Outputs, compare_outputs, outputs
from jaxdeploy.compress.report import Quality, change, size
from jaxdeploy.errors import ConfigError

SCHEMA = "quality/1"
MARKERS = {0: {"marker": "o", "s": 60}, 8: {"marker": "s", "s": 150}, 4: {"marker": "D", "s": 190}}
"""KV cache → its points: full for a float cache, frames around it for the others."""


@dataclass(frozen=True)
class Row:
    """One checkpoint under one KV cache; ``bytes`` are those of its weights on disk."""

    model: str
    policy: int
    bytes: int
    quality: Quality

    @property
    def name(self) -> str:
        """The model, and its KV cache where that is not float."""
        return f"{self.model}{KV_CACHES[self.policy]}"


def main() -> int:
    """Compare, print a table; exit status 2 with one line where that cannot be."""
    return one_line_errors(lambda: run(parse_args()))


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids; the first is the reference")
    parser.add_argument(
        "--quant-policy", type=int, nargs="+", choices=KV_CACHES, default=[0], help="KV caches (default: 0, float)"
    )
    add_shared_arguments(parser)
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="PNG to write: perplexity and KL over size")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Measure every model and report."""
    console = Console()
    text = read_text(args, resolve_model(args.models[0]))
    rows = list(measure(args, text))
    console.print(table(rows, text))
    if args.json:
        record(args, text, rows)
    if args.plot:
        plot(rows, args.plot, console)


def measure(args: argparse.Namespace, text: Calibration) -> Iterator[Row]:
    """A row for each model and KV cache; that of the reference comes first, whatever the flags say."""
    reference: Outputs | None = None
    vocab_size = 0
    for model, name in zip(args.models, unique_labels(args.models), strict=True):
        folder = resolve_model(model)
        decoder, nbytes = load(folder, args), open_checkpoint(folder).nbytes
        vocab_size = vocab_size or decoder.config.vocab_size
        check_vocabulary(model, decoder.config.vocab_size, vocab_size)
        for policy in dict.fromkeys(args.quant_policy if reference else [0, *args.quant_policy]):
            found = outputs(decoder, text.held_out, batch_size=args.batch_size, kv_bits=policy or None, progress=True)
            reference = reference or found
            quality = compare_outputs(reference, found, text.held_out, text.scored).quality()
            yield Row(name, policy, nbytes, quality)


def check_vocabulary(model: str, found: int, wanted: int) -> None:
    """Logits of different vocabularies cannot be compared."""
    if found != wanted:
        raise ConfigError(
            f"model={model} has a vocabulary of {found}, the reference {wanted}; compare checkpoints of one model"
        )


def unique_labels(models: Sequence[str]) -> list[str]:
    """Short names, or the arguments themselves where short ones would be the same."""
    short = [label(model) for model in models]
    return short if len(set(short)) == len(short) else list(models)


def table(rows: Sequence[Row], text: Calibration) -> Table:
    """The rows for people."""
    sequences, seqlen = text.held_out.shape
    title = f"{text.source}: {sequences} × {seqlen} tokens; KL and greedy tokens against {rows[0].name}"
    result = Table(title=title, title_justify="left")
    result.add_column("model")
    for name in ("perplexity", "change", "KL, nats", "greedy same", "weights"):
        result.add_column(name, justify="right")
    for row in rows:
        quality = row.quality
        result.add_row(
            row.name,
            f"{quality.ppl_after:.4f}",
            change(quality.ppl_before, quality.ppl_after),
            f"{quality.kl:.5f}",
            f"{100 * quality.greedy_same:.2f} %",
            size(row.bytes),
        )
    return result


def record(args: argparse.Namespace, text: Calibration, rows: Sequence[Row]) -> None:
    """Write the JSON. A figure that is no number is null."""
    metrics = {row.name: {"bytes": row.bytes, **finite(dataclasses.asdict(row.quality))} for row in rows}
    ratios = {}
    for row in rows[1:]:
        ratios[f"ppl vs reference: {row.name}"] = row.quality.ppl_after / row.quality.ppl_before
        ratios[f"bytes of reference vs: {row.name}"] = rows[0].bytes / row.bytes
    known = {name: value for name, value in ratios.items() if math.isfinite(value)}
    write_result(args.json, SCHEMA, settings(args, text), metrics, known)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with None for what JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def plot(rows: Sequence[Row], path: Path, console: Console) -> None:
    """Write the picture, or say why there is none."""
    try:
        draw(rows, path)
    except ImportError:
        console.print("no plot: matplotlib is not installed here")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Size against perplexity, and against KL, a point for each row. Raises ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure: Any = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list(dict.fromkeys(row.model for row in rows))
    for row in rows:
        color = f"C{models.index(row.model) % 10}"
        style = {**MARKERS[row.policy], "edgecolors": color, "facecolors": "none" if row.policy else color, "zorder": 3}
        left.scatter(row.bytes, row.quality.ppl_after, label=row.name, **style)
        if row.quality.kl > 0:
            right.scatter(row.bytes, row.quality.kl, **style)
    left.axhline(rows[0].quality.ppl_before, color="grey", linewidth=1, linestyle=":")
    left.set_title("Perplexity (dotted: the reference)", loc="left")
    right.set_title(f"KL from {rows[0].name}, nats per token", loc="left")
    if any(row.quality.kl > 0 for row in rows):
        right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlim(0, 1.1 * max(row.bytes for row in rows))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: size(count)))
        axes.set_xlabel("weights on disk")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(rows), 4), frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
