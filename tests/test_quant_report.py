"""The quantisation report: what is written, what is shown, and that no file is ever half there."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_record import write_result
from rich.console import Console

from jaxdeploy.compress import picture
from jaxdeploy.compress.report import LinearReport, Quality, Report, change, show, size
from jaxdeploy.compress.report_files import write

LINEARS = ("wqkv", "wo", "gate_up", "down")


def linear(layer: int, name: str, error: float) -> LinearReport:
    return LinearReport(layer, name, (f"model.layers.{layer}.{name}",), 4, 64, error, 0.004)


def report(**changes: Any) -> Report:
    example = Report(
        model="tiny",
        method="awq",
        settings={"w_bits": 4, "work_dir": Path("here")},
        calibration="128 × 512 tokens of book.txt",
        linears=tuple(linear(i, name, 1e-3 * (i + 1)) for i in range(6) for name in LINEARS),
        quality=Quality(tokens=4088, ppl_before=6.0, ppl_after=6.3, kl=0.0123, greedy_same=0.9612),
        kept_float={
            **{f"model.layers.{i}.mlp.down_proj": "172 inputs hold no group" for i in range(6)},
            "lm_head": "the [head] stays float",
        },
        bytes_before=5_250_000,
        bytes_after=2_100_000,
        predicted_memory={"weights": 0.5, "kv_cache_per_1k_tokens": 0.125},
        seconds=12.5,
        seconds_per_layer=[2.0] * 6,
        peak_memory=3 * 2**30,
        notes=("the text was short",),
    )
    return dataclasses.replace(example, **changes)


def written(found: Report, folder: Path) -> dict[str, Any]:
    write(found, folder)
    result: dict[str, Any] = json.loads((folder / "quant_report.json").read_text())
    return result


def shown(found: Report, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO())
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_json_has_the_keys_of_all_results(tmp_path: Path) -> None:
    result = written(report(), tmp_path / "new" / "folder")
    others = write_result(tmp_path / "other.json", "example/1", {}, {}, {})
    assert set(result) == set(others) - {"git_sha"} | {"linears", "kept_float", "notes"}
    assert result["schema"] == "quant_report/1"
    assert result["device"]["type"] == "cpu"
    assert "jax" in result["versions"]
    assert result["config"]["settings"] == {"w_bits": 4, "work_dir": "here"}


def test_json_holds_the_figures(tmp_path: Path) -> None:
    result = written(report(), tmp_path)
    metrics, ratios = result["metrics"], result["ratios"]
    assert (metrics["ppl_before"], metrics["ppl_after"], metrics["kl"], metrics["greedy_same"]) == (
        6,
        6.3,
        0.0123,
        0.9612,
    )
    assert metrics["output_error_max"] == pytest.approx(6e-3)
    assert metrics["output_error_p50"] == pytest.approx(3.5e-3)
    assert ratios == {"ppl_after_vs_before": pytest.approx(1.05), "bytes_before_vs_after": pytest.approx(2.5)}
    assert len(result["linears"]) == 24
    assert result["linears"][0] == {
        "layer": 0,
        "linear": "wqkv",
        "modules": ["model.layers.0.wqkv"],
        "bits": 4,
        "group_size": 64,
        "output_error": 0.001,
        "weight_error": 0.004,
        "note": "",
    }


def test_without_quality_and_linears(tmp_path: Path) -> None:
    result = written(report(quality=None, linears=(), peak_memory=None, seconds_per_layer=()), tmp_path)
    assert "ppl_after" not in result["metrics"]
    assert result["metrics"]["peak_memory_bytes"] is None
    assert (tmp_path / "quant_report.png").exists()


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    broken = report(
        quality=Quality(8, 6.0, math.inf, math.nan, 0.0),
        linears=(linear(0, "down", 0.0), linear(1, "down", 1e-3), linear(0, "wo", math.nan)),
    )
    result = written(broken, tmp_path)
    assert (result["metrics"]["ppl_after"], result["metrics"]["kl"]) == (None, None)
    assert result["ratios"]["ppl_after_vs_before"] is None
    assert result["metrics"]["output_error_max"] is None, "what is no number is worst of all"
    assert "nan" in shown(broken)


def test_picture_is_a_png(tmp_path: Path) -> None:
    write(report(), tmp_path)
    data = (tmp_path / "quant_report.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quant_report.json", "quant_report.png"]


def test_picture_shows_every_linear_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self))
    picture.draw(report(), io.BytesIO())
    lines = [line for axes in figures[0].subfigs[1].subfigs[0].axes for line in axes.lines]
    assert [line.get_label() for line in lines] == list(LINEARS)
    assert [list(line.get_xdata()) for line in lines] == [list(range(6))] * 4
    assert max(lines[0].get_ydata()) == pytest.approx(6e-3)
    texts = {text.get_text() for text in figures[0].subfigs[0].texts}
    assert {"+5 %", "0.0123", "96.1 %", "÷ 2.50"} <= texts


@pytest.mark.parametrize("layers", [1, 40])
def test_one_layer_or_many_can_be_drawn(layers: int) -> None:
    file = io.BytesIO()
    picture.draw(report(model="/a/path" * 12, linears=tuple(linear(i, "wo", 1e-3) for i in range(layers))), file)
    assert file.getvalue()


def test_without_matplotlib_there_is_a_line_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, "jaxdeploy"):
        write(report(), tmp_path)
    expected = "no quant_report.png: matplotlib is not installed; pip install matplotlib (extra: quantize)"
    assert caplog.messages == [expected]
    assert [path.name for path in tmp_path.iterdir()] == ["quant_report.json"]


@pytest.mark.parametrize("name", ["json.dumps", "jaxdeploy.compress.picture.draw"])
def test_a_failure_leaves_the_earlier_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: Any, **_: Any) -> None:
        if hasattr(arguments[-1], "write"):
            arguments[-1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(name, fail)
    with pytest.raises(OSError, match="disk full"):
        write(report(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_summary_comes_first_and_is_complete() -> None:
    text = shown(report())
    assert text.index("perplexity") < text.index("largest output errors") < text.index("kept float")
    for piece in (
        "tiny: awq, 4 bits, groups of 64",
        "6 → 6.3 (+5 %), 4,088 held-out tokens",
        "0.0123 nats per token",
        "96.1 % unchanged",
        "5.25 MB → 2.1 MB (÷ 2.50)",
        "weights 0.5 GiB, kv cache per 1k tokens 0.125 GiB",
        "12.5 s, 2 s a layer, peak memory 3.00 GiB",
        "128 × 512 tokens of book.txt",
        "note the text was short",
    ):
        assert piece in text


def test_only_the_worst_linears_are_listed() -> None:
    text = shown(report())
    rows = [line.split("│")[1:3] for line in text.splitlines() if line.startswith("│")]
    assert [int(layer) for layer, _ in rows] == [5] * 4 + [4] * 4
    assert "8 of 24 matrices" in text


def test_what_stayed_float_is_named_by_reason() -> None:
    text = shown(report(), width=300)
    assert "model.layers.3.mlp.down_proj and 2 more: 172 inputs hold no group" in text
    assert "lm_head: the [head] stays float" in text


def test_a_channel_is_no_group() -> None:
    eight = tuple(dataclasses.replace(linear(0, "wo", 1e-3), bits=8, group_size=width) for width in (172, 512))
    found = report(method="smooth_quant", linears=eight)
    assert found.title == "smooth_quant, 8 bits"
    assert shown(found).count("│   all │") == 2


def test_no_quality_is_said() -> None:
    assert "not measured" in shown(report(quality=None))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: size(999), "999 B"),
        (lambda: size(5_251_568), "5.25 MB"),
        (lambda: size(140_000_000_000), "140 GB"),
        (lambda: size(1_400_000_000_000), "1,400 GB"),
        (lambda: change(2.0, 1.99), "-0.5 %"),
        (lambda: change(2.0, 200.0), "+9,900 %"),
    ],
)
def test_figures_for_people(make: Callable[[], str], text: str) -> None:
    assert make() == text
