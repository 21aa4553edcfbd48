"""The report of a quantisation: its values, and a table of them. ``report_files`` writes it as JSON and PNG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GIB = 2**30
SHOWN_LINEARS = 8
SHOWN_MODULES = 4
INT8_BITS = 8


@dataclass(frozen=True)
class LinearReport:
    """One quantised matrix W of the decoder.

    ``linear`` is our name for it and ``modules`` the checkpoint's for its parts. ``output_error`` is
    ‖X(W − Ŵ)‖² / ‖XW‖² on the calibration sample X, ``weight_error`` is ‖W − Ŵ‖² / ‖W‖².
    """

    layer: int
    linear: str
    modules: tuple[str, ...]
    bits: int
    group_size: int
    output_error: float
    weight_error: float
    note: str = ""


@dataclass(frozen=True)
class Quality:
    """The model before and after on ``tokens`` predicted tokens of held-out text.

    ``kl`` is the mean KL(float ‖ quantised) in nats per token, ``greedy_same`` the share of positions whose likeliest
    token is unchanged.
    """

    tokens: int
    ppl_before: float
    ppl_after: float
    kl: float
    greedy_same: float


@dataclass(frozen=True)
class Report:
    """One run. ``predicted_memory`` is in GiB, ``kept_float`` says why a module was not quantised.

    ``bytes_before`` and ``bytes_after`` are those of the weight files, ``peak_memory`` is in bytes (None: not known).
    """

    model: str
    method: str
    settings: Mapping[str, Any]
    calibration: str
    linears: tuple[LinearReport, ...]
    quality: Quality | None
    kept_float: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    predicted_memory: Mapping[str, float]
    seconds: float
    seconds_per_layer: Sequence[float]
    peak_memory: int | None
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> list[LinearReport]:
        """The quantised matrices, those with the largest output error (or none that is a number) first."""
        return sorted(self.linears, key=lambda linear: -_magnitude(linear.output_error))

    @property
    def shrink(self) -> float:
        """How many times smaller the weight files became."""
        return self.bytes_before / max(self.bytes_after, 1)

    @property
    def title(self) -> str:
        """The method with its widths: ``awq, 4 bits, groups of 128``."""
        sizes = sorted({linear.group_size for linear in self.linears})
        bits = sorted({linear.bits for linear in self.linears})
        parts = [f"{_joined(bits)} bits"] if bits else []
        parts += [f"groups of {_joined(sizes)}"] if sizes and min(bits) < 8 else []
        return ", ".join([self.method, *parts])


def show(report: Report, console: Console) -> None:
    """Print the summary, the matrices with the largest errors, what stayed float and why, and the notes."""
    from rich.markup import escape

    console.print(_summary(report))
    if report.linears:
        console.print(_worst_table(report))
    for reason, modules in _by_reason(report.kept_float).items():
        console.print(f"[bold]kept float[/] {escape(_listed(modules))}: {escape(reason)}")
    for note in report.notes:
        console.print(f"[bold]note[/] {escape(note)}")


def size(count: float) -> str:
    """``count`` bytes for people: 5.25 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes all")


def change(before: float, after: float) -> str:
    """How much more ``after`` is: +1.3 %."""
    percent = 100 * (after / before - 1)
    return f"{percent:+.3g} %" if abs(percent) < 1000 else f"{percent:+,.0f} %"


def _summary(report: Report) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.model}: {report.title}", title_justify="left", show_header=False, box=None)
    for name, text in _summary_rows(report):
        table.add_row(f"[bold]{name}", escape(text))
    return table


def _summary_rows(report: Report) -> Iterator[tuple[str, str]]:
    quality = report.quality
    if quality:
        before, after = quality.ppl_before, quality.ppl_after
        yield "perplexity", f"{before:.4g} → {after:.4g} ({change(before, after)}), {quality.tokens:,} held-out tokens"
        yield "KL", f"{quality.kl:.3g} nats per token"
        yield "greedy tokens", f"{100 * quality.greedy_same:.1f} % unchanged"
    else:
        yield "quality", "not measured"
    yield "size", f"{size(report.bytes_before)} → {size(report.bytes_after)} (÷ {report.shrink:.2f})"
    if memory := report.predicted_memory:
        yield "memory", ", ".join(f"{name.replace('_', ' ')} {gib:.3g} GiB" for name, gib in memory.items())
    peak = "" if report.peak_memory is None else f", peak memory {report.peak_memory / GIB:.2f} GiB"
    each = f", {median(report.seconds_per_layer):.2g} s a layer" if report.seconds_per_layer else ""
    yield "time", f"{report.seconds:.1f} s{each}{peak}"
    yield "calibration", report.calibration


def _worst_table(report: Report) -> Table:
    from rich.table import Table

    shown = report.worst[:SHOWN_LINEARS]
    title = f"largest output errors, {len(shown)} of {len(report.linears)} matrices"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "linear", "bits", "group", "output error", "weight error", "note"):
        table.add_column(name, justify="left" if name in ("linear", "note") else "right")
    for row in shown:
        errors = (f"{error:.2e}" for error in (row.output_error, row.weight_error))
        table.add_row(str(row.layer), row.linear, str(row.bits), _group(row), *errors, row.note)
    return table


def _group(row: LinearReport) -> str:
    """The inputs that share a scale; 8-bit weights have one scale for all inputs of an output."""
    return "all" if row.bits == INT8_BITS else str(row.group_size)


def _by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for module, reason in kept.items():
        reasons.setdefault(reason, []).append(module)
    return reasons


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_MODULES} more" if len(names) > SHOWN_MODULES else ""
    return ", ".join(names[:SHOWN_MODULES]) + more


def _joined(values: Sequence[int]) -> str:
    return " and ".join(map(str, values))


def _magnitude(error: float) -> float:
    return math.inf if math.isnan(error) else error
