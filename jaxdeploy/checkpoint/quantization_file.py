"""The files next to ``config.json`` in which early AutoGPTQ and AutoAWQ describe quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdeploy.files.stored import exists, read_json

FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""File name → the quantisation method of a file that names none."""

_BASENAMES = ("model_basename", "model_file_base_name")


def quantization_beside(folder: Path) -> dict[str, Any] | None:
    """Return the content of one of ``FILES`` as a ``quantization_config``; ``None`` without a file.

    Raises ``CheckpointError`` if a file cannot be read.
    """
    for name, method in FILES.items():
        if exists(folder / name):
            found = read_json(folder / name)
            if {"bits", "w_bit"} & found.keys():
                return {"quant_method": method, **found}
    return None


def weights_basename(folder: Path) -> str | None:
    """Return the name, without suffix, of the weights file that AutoGPTQ's file names; ``None`` if it names none."""
    found = quantization_beside(folder) or {}
    named = [found[key] for key in _BASENAMES if isinstance(found.get(key), str) and found[key]]
    return next((name for name in named if Path(name).name == name), None)
