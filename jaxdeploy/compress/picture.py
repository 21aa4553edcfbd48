"""The picture of a quantisation report: where the errors are, and what the run as a whole cost and saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from jaxdeploy.compress.report import Report, change, size

INK, GREY = "#1f2937", "#6b7280"
BEFORE, AFTER = "#cbd5e1", "#2563eb"
LINES = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
MARKERS = "osD^vP*X"
MAX_NAME = 40


def draw(report: Report, file: Path | IO[bytes]) -> None:
    """Draw ``report`` as PNG. Raises ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 6.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(_heading(report), x=0.015, ha="left", fontsize=16, color=INK, weight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 4))
    _tiles(top, report)
    left, right = bottom.subfigures(1, 2, width_ratios=(2, 1))
    _errors(left, report)
    bars = _bars(report)
    for axes, (title, values, labels) in zip(right.subplots(len(bars), squeeze=False).flat, bars, strict=True):
        _before_after(axes, title, values, labels)
    figure.savefig(file, format="png", dpi=150, facecolor="white")


def _heading(report: Report) -> str:
    """Model and method; of a long path its end."""
    model = report.model if len(report.model) <= MAX_NAME else f"…{report.model[-MAX_NAME:]}"
    return f"{model} · {report.title}"


def _tiles(figure: Any, report: Report) -> None:
    """The headline figures in a row, and under them what they were measured on."""
    figure.text(0.015, 0.02, f"calibration: {report.calibration}", fontsize=9, color=GREY, va="bottom")
    tiles = _headlines(report)
    for index, (value, label) in enumerate(tiles):
        x = 0.015 + index / len(tiles)
        figure.text(x, 0.66, value, fontsize=21, color=AFTER, weight="bold", va="center")
        figure.text(x, 0.36, label, fontsize=10, color=GREY, va="center")


def _headlines(report: Report) -> list[tuple[str, str]]:
    smaller = (f"÷ {report.shrink:.2f}", "size of the weights")
    quality = report.quality
    if quality is None:
        return [smaller, ("–", "quality not measured")]
    return [
        smaller,
        (change(quality.ppl_before, quality.ppl_after), f"perplexity, {quality.tokens:,} tokens"),
        (f"{quality.kl:.3g}", "KL, nats per token"),
        (f"{100 * quality.greedy_same:.1f} %", "greedy tokens unchanged"),
    ]


def _errors(figure: Any, report: Report) -> None:
    """A line for each linear over the layers."""
    axes = figure.subplots()
    names = list(dict.fromkeys(linear.linear for linear in report.linears))
    if not names:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no matrix was quantised", ha="center", color=GREY)
        return
    for index, name in enumerate(names):
        points = [(row.layer, _drawable(row.output_error)) for row in report.linears if row.linear == name]
        style = {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6, markersize=5, **style)
    axes.set_title("Output error,  ‖X(W − Ŵ)‖² / ‖XW‖²", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("layer", color=GREY)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY)
    _scale_errors(axes, report)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)


def _scale_errors(axes: Any, report: Report) -> None:
    """Whole layers across; errors in percent on a log scale that always has a labelled line."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    layers = [row.layer for row in report.linears]
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 * error:.3g} %"))
    if errors := [row.output_error for row in report.linears if math.isfinite(_drawable(row.output_error))]:
        axes.set_ylim(min(errors) / 1.6, max(errors) * 1.6)


def _drawable(error: float) -> float:
    """A log scale has no place for 0, nor for what is no number."""
    return error if error > 0 else math.nan


def _bars(report: Report) -> list[tuple[str, tuple[float, float], tuple[str, str]]]:
    quality, sizes = report.quality, (report.bytes_before, report.bytes_after)
    bars: list[tuple[str, tuple[float, float], tuple[str, str]]] = []
    if quality:
        values = (quality.ppl_before, quality.ppl_after)
        bars.append(("Perplexity, held-out text", values, (f"{values[0]:.4g}", f"{values[1]:.4g}")))
    return [*bars, ("Weights on disk", sizes, (size(sizes[0]), size(sizes[1])))]


def _before_after(axes: Any, title: str, values: Sequence[float], labels: Sequence[str]) -> None:
    drawn = [value if math.isfinite(value) else 0.0 for value in values]
    bars = axes.barh(("before", "after"), drawn, color=(BEFORE, AFTER), height=0.62)
    axes.bar_label(bars, labels, padding=4, fontsize=10, color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlim(0, 1.3 * max(*drawn, 1e-9))
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.tick_params(axis="y", left=False, colors=GREY)
