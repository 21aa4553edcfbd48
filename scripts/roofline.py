"""A roofline plot (doi:10.1145/1498765.1498785) of what ``bench_kernels.py`` measured, under that run's own roofs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_record import save_figure
from kernel_goals import CUBLAS

PHASES = {"decode": "o", "prefill": "s"}
"""Phase → marker."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot of one result file's content as PNG, or as what the suffix of ``path`` says.

    A dot for each shape stands for the backend that the op prefers. Raises ``ImportError`` without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    metrics = result["metrics"]
    bandwidth, rate = (metrics["ceilings"][name] / 1e12 for name in ("copy_bytes_s", "matmul_flop_s"))
    points = preferred(metrics["rows"])
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [point["flop_per_byte"] for point in points] or [1.0]
    left, right = min(0.5, *intensities) / 2, max(4 * rate / bandwidth, *intensities) * 2
    ridge = rate / bandwidth
    axes.plot([left, ridge, right], [left * bandwidth, rate, rate], color="black", linewidth=1.2, zorder=1)
    middle = (left * ridge) ** 0.5
    for text, place in (
        (f"copy: {bandwidth:.3g} TB/s", (middle, middle * bandwidth)),
        (f"bf16 matmul: {rate:.3g} TFLOP/s", (ridge, rate)),
    ):
        axes.annotate(text, place, (-8, 2), textcoords="offset points", ha="right")
    for index, op in enumerate(sorted({point["op"] for point in points})):
        for phase, marker in PHASES.items():
            mine = [point for point in points if (point["op"], point["phase"]) == (op, phase)]
            if mine:
                axes.scatter(
                    [point["flop_per_byte"] for point in mine],
                    [point["tflop_s"] for point in mine],
                    s=26,
                    marker=marker,
                    color=f"C{index}",
                    edgecolors="white",
                    linewidths=0.4,
                    label=f"{op}, {phase}",
                    zorder=2,
                )
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("TFLOP/s (w8a8_matmul: 10¹² integer operations/s)")
    axes.set_title(f"{result['device']['name']}, jax {result['versions']['jax']}, {result['git_sha'][:9]}", fontsize=10)
    axes.grid(which="major", alpha=0.25)
    if points:
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    save_figure(figure, path, dpi=160)
    plt.close(figure)


def preferred(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first timed row of each op and shape: rows come in the op's order of preference."""
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        if "us" in row and row["backend"] != CUBLAS:
            first.setdefault((row["op"], row["shape"]), row)
    return list(first.values())
