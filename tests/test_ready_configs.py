"""Every YAML file in configs/ fits the commands that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantize as script
from demo.training import TrainConfig

from jaxdeploy.cli import chat, lite, main, serve
from jaxdeploy.compress.layout import choose_format
from jaxdeploy.config import EngineConfig, QuantConfig
from jaxdeploy.settings import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(str(file.relative_to(CONFIGS)) for pattern in ("*.yaml", "*.yml") for file in CONFIGS.rglob(pattern))
QUANT = [name for name in FILES if name.startswith("quant/")]
COMMAND_LINES = {
    "awq": "auto_awq",
    "gptq": "auto_gptq",
    "kv": "calibrate",
    "rtn": "rtn",
    "smoothquant": "smooth_quant",
}
"""First word of a file in configs/quant → LMDeploy's name of the method."""


class ReachedError(Exception):
    """The settings were accepted."""


def reached(*_: Any, **__: Any) -> None:
    raise ReachedError


def test_every_file_is_tested() -> None:
    assert {name.split("/")[0] for name in FILES} == {"engine", "quant", "serve", "train"}


@pytest.mark.parametrize("name", QUANT)
def test_quantising(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[QuantConfig] = []
    monkeypatch.setattr(lite, "show", lambda model, config: found.append(config))
    monkeypatch.setattr(script, "show", lambda model, config: found.append(config))
    path = str(CONFIGS / name)
    word = COMMAND_LINES[Path(name).name.split("-")[0]]
    assert main(["lite", word, "model", "--config", path]) == 0
    assert script.main(["--config", path, "model=model"]) == 0
    one, other = found
    assert one == other
    choose_format(one)
    other_word = "rtn" if word != "rtn" else "auto_awq"
    assert main(["lite", other_word, "model", "--config", path]) == 2
    assert f"is not {other_word}; give the method that the file is for" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("serve/")])
def test_serving(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("_serve", "_stand_in_front"):
        monkeypatch.setattr(serve, function, reached)
    program = "proxy" if "proxy" in name else "api_server"
    with pytest.raises(ReachedError):
        main(["serve", program, "--config", str(CONFIGS / name)])


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("engine/")])
def test_engines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_load", reached)
    with pytest.raises(ReachedError):
        main(["chat", "--prompt", "hi", "--config", str(CONFIGS / name)])
    if "throughput" in name:
        EngineConfig(**read_yaml(str(CONFIGS / name)))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("train/")])
def test_training(name: str) -> None:
    TrainConfig.read(CONFIGS / name, [])
