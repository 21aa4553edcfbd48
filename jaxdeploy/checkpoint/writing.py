"""JSON and safetensors files, each written whole or not at all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxdeploy.checkpoint.safetensors_reader import DTYPES
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.files.atomic import put_file

Specs = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Tensors to come: name → dtype and shape."""

_UNFINISHED = re.compile(r"\.(.+?)(\.\d+)?\.tmp")
"""The names of the temporary files of ``put_file``."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def unfinished_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the temporary files that interrupted writes of ``names`` left in ``folder``. Raises ``OSError``."""
    known = set(names)
    return [file for file in folder.glob(".*.tmp") if (match := _UNFINISHED.fullmatch(file.name)) and match[1] in known]


def put_json(file: Path, value: Any) -> None:
    """Write ``value`` as JSON, keys sorted. Raises ``OSError``."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    put_file(file, lambda handle: handle.write(text.encode()))


def put_tensors(file: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file of arrays that are there. Raises ``OSError``."""
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    put_file(file, lambda handle: write_tensors(handle, specs, tensors.values()))


def write_tensors(handle: IO[bytes], specs: Specs, arrays: Iterable[Array]) -> None:
    """A safetensors file whose arrays come one by one, in the order of ``specs``, and are cast to their dtype."""
    header = json.dumps(_header(specs), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    handle.write(len(header).to_bytes(8, "little") + header)
    for array, (dtype, _) in zip(arrays, specs.values(), strict=True):
        handle.write(np.array(array, dtype, order="C").reshape(-1).view(np.uint8).data)


def _header(specs: Specs) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in specs.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return header
