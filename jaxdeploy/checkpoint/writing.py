"""Files that are there whole or not at all, and safetensors files among them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxdeploy.checkpoint.safetensors_reader import DTYPES
from jaxdeploy.checkpoint.tensor_ref import Array

Specs = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Tensors to come: name → dtype and shape."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def put_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside ``file`` and rename: whoever reads it sees the old one or the whole new one. Raises ``OSError``."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


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
