"""Where a model comes from: a local folder, or an id on the Hugging Face hub that is downloaded into one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxdeploy.checkpoint.meta import is_meta_folder, meta_config
from jaxdeploy.checkpoint.quantization_file import quantization_beside
from jaxdeploy.errors import CheckpointError, ModelNotFoundError
from jaxdeploy.files.stored import exists, is_folder, read_json, user_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "*/*/*"]
"""All of a repository's, but for those that begin as ``additional_chat_templates`` does."""
_TEXT_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
_WEIGHT_FILES = (
    ("model*.safetensors",),
    ("pytorch_model*.bin",),
    ("consolidated.*.pth",),
    ("*.safetensors",),
    ("*.bin",),
    ("*.pt",),
)


def resolve_model(
    model: str | Path, *, revision: str | None = None, download_dir: str | None = None, weights: bool = True
) -> Path:
    """The local folder of ``model``: the folder itself, or what the hub id ``owner/name`` holds, downloaded.

    A download resumes where it was interrupted and shows its progress on stderr; without a network a complete earlier
    download is used. ``revision`` is a branch, tag or commit, ``download_dir`` replaces the hub's cache folder. Only
    weights (unless ``weights`` is false), configuration and tokenizer files are fetched, never code.

    Raises ``ModelNotFoundError``: no such folder, or the hub refuses or cannot be reached. ``CheckpointError``: the
    folder has no ``config.json`` (nor Meta's ``params.json``).
    """
    folder = user_path(model)
    if not is_folder(folder):
        folder = _download(_hub_id(str(model), folder), revision, download_dir, weights)
    if not any(exists(folder / name) for name in ("config.json", "params.json")):
        raise CheckpointError(f"model={model} has no config.json; give a folder in Hugging Face layout")
    return folder


def read_hf_config(folder: Path, model_format: str | None = None) -> dict[str, Any]:
    """``config.json`` of a folder, or what it would be for Meta's files (``model_format`` "llama", or found alone).

    Raises ``CheckpointError``: it is missing or no JSON object.
    """
    if model_format == "llama" or (model_format is None and is_meta_folder(folder)):
        return meta_config(folder)
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError as error:
        raise CheckpointError(f"model={folder} has no config.json; give a folder in Hugging Face layout") from error
    if "quantization_config" not in config and (found := quantization_beside(folder)):
        config["quantization_config"] = found
    return config


def _hub_id(model: str, folder: Path) -> str:
    """``model`` where it can be a hub id.

    Raises ``ModelNotFoundError``: it can only be meant as a folder, and there is none.
    """
    if exists(folder):
        raise ModelNotFoundError(f"model={model} is a file; give the folder that it lies in")
    if not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(f"model={model} does not exist; give a model's folder or a hub id (owner/name)")
    return model


def _download(model: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        patterns = [*_TEXT_FILES, *(_weight_files(model, revision) if weights else ())]
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, cache_dir=download_dir, allow_patterns=patterns, ignore_patterns=_FOLDERS
            )
        )
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"model={model} is no folder, and no model on the hub that you may read; check the name, or log in"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"revision={revision} does not exist for model={model}; check its name") from error
    except Exception as error:  # the client lets its HTTP library's errors through, and those changed before
        raise ModelNotFoundError(
            f"model={model} is no folder, and the hub cannot be reached ({_reason(error)}); "
            "check the path, connect, or give the folder of an earlier download"
        ) from error


def _weight_files(model: str, revision: str | None) -> tuple[str, ...]:
    """Patterns of the one weight format to fetch, the first that the repository has; all where it cannot be asked."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(model, revision=revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # no network: the cache may still have what is wanted
        return tuple(pattern for patterns in _WEIGHT_FILES for pattern in patterns)
    names = [file.rfilename for file in info.siblings or ()]
    for patterns in _WEIGHT_FILES:
        if any(Path(name).match(patterns[0]) and "/" not in name for name in names):
            return patterns
    return ()


def _reason(error: BaseException) -> str:
    """The first sentence of an error of the hub's client."""
    text = str(error).strip().split("\n")[0]
    return text.split(". ")[0].rstrip(".") or type(error).__name__
