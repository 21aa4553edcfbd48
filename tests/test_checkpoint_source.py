from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.errors import CheckpointError, JaxdeployError, ModelNotFoundError


def message(model: str | Path, kind: type[JaxdeployError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        resolve_model(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert resolve_model(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == tmp_path
    assert read_hf_config(tmp_path) == {"a": 1}


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "missing", "a/b/c", "~/no-such-model"])
def test_missing_path(model: str) -> None:
    expected = f"model={model} does not exist; give a model's folder or a hub id (owner/name)"
    assert message(model, ModelNotFoundError) == expected


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    file = tmp_path / "model.gguf"
    assert message(file, ModelNotFoundError) == f"model={file} is a file; give the folder that it lies in"


def test_folder_without_config(tmp_path: Path) -> None:
    expected = f"model={tmp_path} has no config.json; give a folder in Hugging Face layout"
    assert message(tmp_path, CheckpointError) == expected
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value) == expected


@pytest.mark.parametrize(("content", "rule"), [("{", r"is not JSON \(.*\)"), ("[]", "is not a JSON object")])
def test_config_that_is_none(tmp_path: Path, content: str, rule: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^.*config\.json: {rule}; download it again$"):
        read_hf_config(tmp_path)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client without a network, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_offline(hub_cache: Path) -> None:
    told = message("acme/tiny", ModelNotFoundError, download_dir=str(hub_cache))
    assert told.startswith("model=acme/tiny is no folder, and the hub cannot be reached (")
    assert told.endswith("); check the path, connect, or give the folder of an earlier download")


def test_earlier_download_is_used_offline(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--acme--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    references = hub_cache / "models--acme--tiny" / "refs"
    references.mkdir()
    (references / "main").write_text("0" * 40)
    assert resolve_model("acme/tiny", download_dir=str(hub_cache)) == snapshot


class Hub:
    """Stands for the hub: what it holds, and what was asked of it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.asked = folder, names, dict[str, Any]()

    def model_info(self, model: str, revision: str | None) -> Any:
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, model: str, **options: Any) -> str:
        self.asked = {"model": model, **options}
        return str(self.folder)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"], ["model*.safetensors"]),
        (["pytorch_model-00001-of-00002.bin"], ["pytorch_model*.bin"]),
        (["consolidated.00.pth", "params.json"], ["consolidated.*.pth"]),
        (["README.md"], []),
    ],
)
def test_one_weight_format_is_fetched_and_never_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], weights: list[str]
) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text("{}")
    hub = Hub(tmp_path, names)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert resolve_model("acme/tiny", revision="v1", download_dir="/somewhere") == tmp_path
    texts = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
    assert hub.asked == {
        "model": "acme/tiny",
        "revision": "v1",
        "cache_dir": "/somewhere",
        "allow_patterns": texts + weights,
        "ignore_patterns": ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "*/*/*"],
    }


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            "RepositoryNotFoundError",
            "model=acme/tiny is no folder, and no model on the hub that you may read; check the name, or log in",
        ),
        ("RevisionNotFoundError", "revision=v9 does not exist for model=acme/tiny; check its name"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: str, expected: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    class Refusing:
        def model_info(self, model: str, revision: str | None) -> Any:
            kind = getattr(errors, error)
            raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    assert message("acme/tiny", ModelNotFoundError, revision="v9") == expected
