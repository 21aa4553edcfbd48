"""The files beside ``config.json`` in which early AutoGPTQ and AutoAWQ describe quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdeploy.stored_file import exists, read_json

FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Name of the file and the method it stands for unless it names one."""

_BASENAMES = ("model_basename", "model_file_base_name")


def quantization_beside(folder: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` that such a file stands for; ``None`` where there is none.

    Raises ``CheckpointError``: a file is there and cannot be read.
    """
    for name, method in FILES.items():
        if exists(folder / name):
            found = read_json(folder / name)
            if {"bits", "w_bit"} & found.keys():
                return {"quant_method": method, **found}
    return None


def weights_basename(folder: Path) -> str | None:
    """The name, without suffix, of the weights file that a file of AutoGPTQ's names; ``None`` where it names none."""
    found = quantization_beside(folder) or {}
    named = [found[key] for key in _BASENAMES if isinstance(found.get(key), str) and found[key]]
    return next((name for name in named if Path(name).name == name), None)
