#!/usr/bin/env python
"""What each quantisation method costs in quality, on two trained models and text that nothing was calibrated on.

Perplexity, KL and the errors of the matrices, for the bundled model and for stories260K from ../shared. Methods are
compared on the same grid: symmetric ones, which GPTQ files have by default, have rows of their own.

    python scripts/quant_quality.py --out benchmarks/results/quantization_quality.json
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from bench_record import ROOT, picture_path, result_path, save_figure, write_result
from demo.dialogues import make_dialogue
from demo.tokenizer import encode_dialogue, load_tokenizer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jaxdeploy import EngineConfig, GenerationConfig, pipeline
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.compress.calibration import Calibration
from jaxdeploy.compress.evaluate import Outputs, Tally, compare_outputs
from jaxdeploy.compress.layout import Layout
from jaxdeploy.compress.passage import Passage
from jaxdeploy.compress.report import LinearReport, Quality, change
from jaxdeploy.compress.weights import FloatModel, Outer
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.parallel.mesh import make_mesh

Array = np.ndarray[Any, Any]

SCHEMA = "quantization_quality/1"
DEMO = ROOT / "jaxdeploy/demo"
STORIES = ROOT.parent / "shared/assets/models/stories260K"
LENGTH = 256
"""Tokens of a sequence: as many as the demo was trained on at once."""

CASES: Mapping[str, Mapping[str, Any]] = {
    **{
        f"{method} W{bits}": {"method": method, "w_bits": bits, "w_sym": False}
        for bits in (4, 3)
        for method in ("rtn", "awq", "gptq")
    },
    **{
        f"{method} W{bits} symmetric": {"method": method, "w_bits": bits, "w_sym": True}
        for bits in (4, 3)
        for method in ("rtn", "gptq")
    },
    "smooth_quant W8A8": {"method": "smooth_quant"},
    "KV int8": {"method": "calibrate", "kv_bits": 8},
    "KV int4": {"method": "calibrate", "kv_bits": 4},
}
"""Name → fields of ``QuantConfig``."""


@dataclass(frozen=True, eq=False)
class Text:
    """Sequences to calibrate on, int32 [S, T], and others, ``held_out`` int32 [E, T], to measure with.

    Of those the tokens count that ``scored`` bool [E, T] marks.
    """

    calib: Array
    held_out: Array
    scored: Array
    source: str


@dataclass(frozen=True)
class Measured:
    """What a case does to a model: a tally for each held-out sequence, and the errors of its matrices."""

    tallies: tuple[Tally, ...]
    linears: tuple[LinearReport, ...]
    kept_float: Mapping[str, str]

    @property
    def quality(self) -> Quality:
        """All sequences together."""
        return sum(self.tallies, Tally()).quality()

    @property
    def output_error(self) -> float | None:
        """The mean over all quantised matrices of ‖X(W − Ŵ)‖² / ‖XW‖²."""
        return fmean(linear.output_error for linear in self.linears) if self.linears else None

    @property
    def weight_error(self) -> float | None:
        """The mean over all quantised matrices of ‖W − Ŵ‖² / ‖W‖²."""
        return fmean(linear.weight_error for linear in self.linears) if self.linears else None

    def nll_above(self, other: Measured | None = None) -> tuple[float, float]:
        """How many nats per token this costs more than ``other`` (``None``: than float), and the standard error.

        The difference is taken sequence by sequence, so that what is hard for both cancels out.
        """
        mine = np.array([tally.nll_after for tally in self.tallies])
        its = np.array([tally.nll_after for tally in other.tallies] if other else self._float)
        tokens = np.array([tally.tokens for tally in self.tallies])
        mean = float((mine - its).sum() / tokens.sum())
        spread = np.square(mine - its - mean * tokens).sum()
        return mean, float(np.sqrt(spread) / tokens.sum())

    @property
    def _float(self) -> list[float]:
        return [tally.nll_before for tally in self.tallies]


def demo_text(calib: int, held_out: int) -> Text:
    """Dialogues of the kind that the demo was trained on, from seeds that training has not: only replies count.

    Half of those held out are made of combinations that training never shows, as in ``demo.evaluation``.
    """
    known = _dialogues("quality", held_out - held_out // 2, held_out=False)
    unseen = _dialogues("quality", held_out // 2, held_out=True)
    ids, scored = (np.concatenate(pair) for pair in zip(known, unseen, strict=True))
    return Text(_dialogues("calibration", calib, held_out=False)[0], ids, scored, "dialogues made for it, replies only")


def _dialogues(seed: str, rows: int, *, held_out: bool) -> tuple[Array, Array]:
    """Rows as in training, whole dialogues of which the last is cut: ids int32 and "of a reply" bool, [rows, T]."""
    tokenizer, rng = load_tokenizer(DEMO), random.Random(f"{seed}-{held_out}")

    def row() -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []
        while len(pairs) < LENGTH:
            pairs += zip(*encode_dialogue(tokenizer, make_dialogue(rng, held_out=held_out)), strict=True)
        return pairs[:LENGTH]

    ids, owners = np.moveaxis(np.array([row() for _ in range(rows)], np.int32), 2, 0)
    return ids, owners > 0


def stories_text(calib: int, held_out: int) -> Text:
    """Stories that the model itself tells, each drawn with a seed of its own: no text of its kind is at hand."""
    rows = calib + held_out
    draws = [
        GenerationConfig(max_new_tokens=LENGTH - 1, temperature=1.0, top_k=0, ignore_eos=True, random_seed=seed)
        for seed in range(rows)
    ]
    engine = EngineConfig(max_batch_size=rows, session_len=LENGTH, warmup=False)
    with pipeline(str(STORIES), backend_config=engine) as pipe:
        start = [pipe.tokenizer.bos_token_id]
        told = pipe([{"prompt_token_ids": start}] * rows, draws)
    assert isinstance(told, list), "many prompts were given"
    ids = np.array([start + list(story.token_ids) for story in told], np.int32)
    return Text(ids[:calib], ids[calib:], np.ones_like(ids[calib:], np.bool_), "stories that it tells")


def measure(folder: Path, text: Text, **settings: Any) -> Measured:
    """Quantise the model in ``folder``, in memory, with ``settings`` of ``QuantConfig``, and compare it with itself."""
    config = QuantConfig(batch_size=8, **settings)
    model = FloatModel.open(folder, read_hf_config(folder), config.load_format)
    layout, outer = Layout.of(model, config), model.outer()
    data = Calibration(text.calib, text.held_out, text.source, None)
    passage = Passage(model, config, layout, None, data, outer["embedding", "table"], make_mesh(1))
    for index in range(model.config.num_layers):
        passage.layer(index)
    outputs = passage.outputs(Outer.of(model.config, outer))
    assert outputs is not None, "there is held-out text"
    return Measured(tuple(_tallies(*outputs, text)), tuple(passage.linears), layout.kept)


def _tallies(before: Outputs, after: Outputs, text: Text) -> Iterator[Tally]:
    for row in range(len(text.held_out)):
        one = slice(row, row + 1)
        first, second = (Outputs(side.hidden[one], side.head) for side in (before, after))
        yield compare_outputs(first, second, text.held_out[one], text.scored[one])


MODELS: Mapping[str, tuple[Path, Callable[[int, int], Text], int, int]] = {
    "demo": (DEMO, demo_text, 64, 1024),
    "stories260K": (STORIES, stories_text, 64, 256),
}
"""Name → folder, text, and how many sequences of it to calibrate on and to measure with."""


def main() -> int:
    """Measure, print, write; 2 with one line where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_path, default=ROOT / "benchmarks/results/quantization_quality.json")
    parser.add_argument("--plot", type=picture_path, default=ROOT / "docs/images/quantization_quality.png")
    args = parser.parse_args()
    if not STORIES.is_dir():
        print(ConfigError(f"{STORIES} is not there; put the shared assets beside the checkout"), file=sys.stderr)
        return 2
    found: dict[str, dict[str, Measured]] = {}
    texts = {name: make_text(calib, held_out) for name, (_, make_text, calib, held_out) in MODELS.items()}
    for name, text in texts.items():
        bar = tqdm(CASES.items(), desc=name, unit="case")
        found[name] = {case: measure(MODELS[name][0], text, **settings) for case, settings in bar}
        Console(width=140).print(table(name, found[name], text))
    result = record(args.out, found, texts)
    try:
        draw(result["metrics"], args.plot)
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
    return 0


def baseline(case: str, cases: Mapping[str, Measured]) -> Measured | None:
    """Rounding to nearest on the grid of ``case``; ``None`` where that is ``case`` itself, or no such thing."""
    method, _, grid = case.partition(" ")
    return cases.get(f"rtn {grid}") if method != "rtn" else None


def table(model: str, cases: Mapping[str, Measured], text: Text) -> Table:
    """The cases for people."""
    tokens = next(iter(cases.values())).quality.tokens
    result = Table(title=f"{model}: {tokens:,} tokens held out, {text.source}", title_justify="left")
    result.add_column("case")
    for name in ("perplexity", "change", "nats above RTN", "KL, nats", "greedy same", "output error", "weight error"):
        result.add_column(name, justify="right")
    for case, measured in cases.items():
        quality, rtn = measured.quality, baseline(case, cases)
        above = "{:+.5f} ± {:.5f}".format(*measured.nll_above(rtn)) if rtn else ""
        errors = ("" if error is None else f"{error:.2e}" for error in (measured.output_error, measured.weight_error))
        moved = change(quality.ppl_before, quality.ppl_after)
        figures = f"{quality.ppl_after:.4f}", moved, above, f"{quality.kl:.5f}", f"{100 * quality.greedy_same:.2f} %"
        result.add_row(case, *figures, *errors)
    return result


def record(
    path: Path, found: Mapping[str, Mapping[str, Measured]], texts: Mapping[str, Text]
) -> Mapping[str, Mapping[str, Any]]:
    """Write the JSON, and return what it says."""
    config = {
        name: {"source": text.source, "calib": text.calib.shape, "held_out": text.held_out.shape}
        for name, text in texts.items()
    }
    metrics = {
        model: {case: _figures(measured, baseline(case, cases)) for case, measured in cases.items()}
        for model, cases in found.items()
    }
    ratios = {
        f"ppl vs float: {model}, {case}": measured.quality.ppl_after / measured.quality.ppl_before
        for model, cases in found.items()
        for case, measured in cases.items()
    }
    return write_result(path, SCHEMA, {"length": LENGTH, "texts": config, "cases": CASES}, metrics, ratios)


def _figures(measured: Measured, rtn: Measured | None) -> dict[str, Any]:
    quality = measured.quality
    above = {"above_float": measured.nll_above()} | ({"above_rtn": measured.nll_above(rtn)} if rtn else {})
    return {
        "tokens": quality.tokens,
        "ppl_float": quality.ppl_before,
        "ppl": quality.ppl_after,
        "kl_nats": quality.kl,
        "greedy_same": quality.greedy_same,
        **{f"nats_{name}": value for name, (value, _) in above.items()},
        **{f"nats_{name}_standard_error": error for name, (_, error) in above.items()},
        "output_error": measured.output_error,
        "weight_error": measured.weight_error,
        "kept_float": sorted(measured.kept_float),
    }


COLORS = {"rtn": "#94a3b8", "awq": "#2563eb", "gptq": "#059669", "smooth_quant": "#d97706", "KV": "#7c3aed"}
INK, GREY = "#1f2937", "#6b7280"


def draw(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel for each model of a result: KL of every case, and beside it what its perplexity did."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 5.6), layout="constrained")
    figure.suptitle(
        "What quantising costs, on held-out text", x=0.012, ha="left", fontsize=15, color=INK, weight="bold"
    )
    for axes, (model, cases) in zip(figure.subplots(1, len(metrics), sharey=True), metrics.items(), strict=True):
        _panel(axes, model, {case: one for case, one in cases.items() if "symmetric" not in case})
    save_figure(figure, path)


def _panel(axes: Any, model: str, cases: Mapping[str, Any]) -> None:
    kls = [figures["kl_nats"] for figures in cases.values()]
    least, most = min(kls) / 2, max(kls)
    for place, (case, figures) in enumerate(cases.items()):
        kl, color = figures["kl_nats"], COLORS[case.split()[0]]
        axes.plot((least, kl), (place, place), color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(kl, place, "o", color=color, markersize=11)
        moved = f"{100 * (figures['ppl'] / figures['ppl_float'] - 1):+.2f} %"
        axes.text(most * 2.2, place, moved, va="center", fontsize=10, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(least, most * 12)
    axes.set_yticks(range(len(cases)), cases, fontsize=11, color=INK)
    axes.set_ylim(len(cases) - 0.4, -1.1)
    axes.text(most * 2.2, -0.8, "perplexity", va="center", fontsize=10, color=GREY)
    axes.set_title(f"{model}, perplexity {figures['ppl_float']:.3f} in float", loc="left", fontsize=12, color=INK)
    axes.set_xlabel("KL from float, nats per token", color=GREY)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", left=False)
    axes.tick_params(axis="x", colors=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
