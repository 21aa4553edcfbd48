"""scripts/eval_ppl.py and scripts/eval_quality.py, on the bundled model and on copies of it that are worse."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_ppl
import eval_quality
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import jaxdeploy
from jaxdeploy.compress.report import Quality
from jaxdeploy.errors import ConfigError

DEMO = Path(jaxdeploy.__file__).parent / "demo"
SHORT = ("--seqlen", "32", "--samples", "2", "--batch-size", "2")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A script's exit status, output and messages, without the progress bars."""

    def call(script: Any, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        status = script.main()
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if line.strip() and "%|" not in line]
        return status, out, "".join(f"{line}\n" for line in said)

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("The cache holds keys and values. A block is a piece of it. " * 12)
    return path


def noisy_copy(folder: Path, noise: float) -> Path:
    """The demo with a little noise on every weight."""
    shutil.copytree(DEMO, folder)
    random = np.random.default_rng(0)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        wide = value.astype(np.float32)
        weights[name] = (wide + noise * wide.std() * random.standard_normal(wide.shape)).astype(value.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_perplexity_is_one_line(run: Run, text: Path) -> None:
    status, out, err = run(eval_ppl, DEMO, "--text", text, *SHORT)
    assert (status, out.count("\n"), err) == (0, 1, "")
    assert out.startswith("demo: perplexity ")
    assert "62 tokens" in out
    assert "book.txt" in out


def test_perplexity_as_json(run: Run, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "results" / "ppl.json"
    status, out, _ = run(eval_ppl, DEMO, "--text", text, *SHORT, "--quant-policy", 4, "--json", path)
    result = json.loads(path.read_text())
    assert status == 0
    assert out.startswith("demo, int4 KV cache: perplexity ")
    assert result["schema"] == "perplexity/1"
    assert f"{result['metrics']['ppl']:.4f}" in out
    assert (result["config"]["sequences"], result["config"]["seqlen"], result["config"]["quant_policy"]) == (2, 32, 4)


def test_nothing_is_written_unasked(run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(eval_ppl, DEMO, "--text", text, *SHORT)
    run(eval_quality, DEMO, "--text", text, *SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_text_that_is_short_is_said(run: Run, text: Path) -> None:
    status, _, err = run(eval_ppl, DEMO, "--text", text, "--seqlen", 32, "--samples", 5000)
    assert status == 0
    assert err.count("\n") == 1
    assert "held out" in err


def test_the_text_of_the_model_is_the_default(run: Run) -> None:
    """Of its conversations only the replies are measured."""
    status, out, err = run(eval_ppl, DEMO, *SHORT)
    assert status == 0
    assert "the model's own text" in out
    assert "62 tokens" not in out
    assert "only the replies are measured" in err


@pytest.mark.parametrize("script", [eval_ppl, eval_quality])
@pytest.mark.parametrize(
    ("model", "name", "told"),
    [("nowhere", "book.txt", "model=nowhere does not exist"), (DEMO, "missing.txt", "missing.txt")],
)
def test_mistakes_get_one_line(script: Any, model: object, name: str, told: str, run: Run, text: Path) -> None:
    status, out, err = run(script, model, "--text", text.with_name(name))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert told in err


@pytest.mark.parametrize("flag", ["--samples", "--seqlen", "--batch-size", "--tp"])
def test_counts_must_be_positive(flag: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(eval_ppl, DEMO, flag, 0)
    assert f"argument {flag}: 0 must be at least 1" in capsys.readouterr().err


def test_worse_models_are_further_away(run: Run, text: Path, tmp_path: Path) -> None:
    near, far = noisy_copy(tmp_path / "near", 0.01), noisy_copy(tmp_path / "far", 0.1)
    result_path, picture = tmp_path / "quality.json", tmp_path / "new" / "quality.png"
    flags = ("--text", text, *SHORT, "--quant-policy", 8, 0)
    status, out, err = run(eval_quality, DEMO, near, far, *flags, "--json", result_path, "--plot", picture)
    result = json.loads(result_path.read_text())
    metrics = result["metrics"]
    assert (status, err, result["schema"]) == (0, "", "quality/1")
    names = ["demo", "demo, int8 KV cache", "near, int8 KV cache", "near", "far, int8 KV cache", "far"]
    assert list(metrics) == names
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == names
    assert (metrics["demo"]["kl"], metrics["demo"]["greedy_same"]) == (0.0, 1.0)
    assert metrics["demo"]["kl"] < metrics["demo, int8 KV cache"]["kl"] < metrics["near"]["kl"] < metrics["far"]["kl"]
    assert metrics["far"]["greedy_same"] < 1
    assert metrics["demo"]["bytes"] == pytest.approx(5_247_488, rel=1e-3)
    assert result["ratios"]["ppl vs reference: far"] != 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_vocabulary_only() -> None:
    eval_quality.check_vocabulary("same", 96, 96)
    with pytest.raises(ConfigError, match="model=other has a vocabulary of 97, the reference 96; compare"):
        eval_quality.check_vocabulary("other", 97, 96)


def test_equal_names_are_told_apart() -> None:
    assert eval_quality.unique_labels(["a/demo", "b/small"]) == ["demo", "small"]
    assert eval_quality.unique_labels(["a/demo", "b/demo"]) == ["a/demo", "b/demo"]


def test_no_plot_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = [eval_quality.Row("one", 0, 10, Quality(1, 2.0, 2.0, 0.0, 1.0))]
    eval_quality.plot(rows, tmp_path / "x.png", Console())
    assert capsys.readouterr().out == "no plot: matplotlib is not installed here\n"
    assert not (tmp_path / "x.png").exists()


def test_what_is_no_number_is_null() -> None:
    assert eval_quality.finite({"kl": float("nan"), "tokens": 3}) == {"kl": None, "tokens": 3}
