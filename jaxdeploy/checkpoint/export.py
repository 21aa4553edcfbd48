"""Parameters → a folder in Hugging Face layout: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxdeploy.checkpoint.safetensors_reader import DTYPES
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.weights import ParamPath, WeightTable

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_writable(folder: str | Path) -> Path:
    """The folder, made if it is missing; call it before work whose result is to be written there.

    Raises ``CheckpointError``: it cannot be made or written.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise CheckpointError(f"save_path={folder} cannot be written ({error.strerror}); use another folder") from error


def save_checkpoint(
    folder: str | Path,
    params: Mapping[ParamPath, Any],
    table: WeightTable,
    hf_config: Mapping[str, Any],
    *,
    dtype: Any = np.float32,
) -> None:
    """Write ``params`` under the names and in the layout that ``table`` reads, cast to the float ``dtype``.

    ``hf_config`` becomes ``config.json``, with the dtype put in. Each file appears under its name when it is complete,
    the configuration last.

    Raises ``CheckpointError``: the folder cannot be written, or ``params`` and ``table`` name other parameters.
    """
    path, dtype = check_writable(folder), np.dtype(dtype)
    if odd := sorted(".".join(map(str, name)) for name in params.keys() ^ table.keys()):
        raise CheckpointError(f"parameters {', '.join(odd)} are not both in the model and its weight table; mend them")
    config = {name: value for name, value in hf_config.items() if name != "torch_dtype"} | {"dtype": dtype.name}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _replace(path / "model.safetensors", lambda handle: _write_tensors(handle, params, table, dtype))
    _replace(path / "config.json", lambda handle: _write(handle, text.encode()))


def _replace(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write beside ``file`` and rename: whoever reads it sees the old one or the whole new one."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise CheckpointError(f"save_path={file} cannot be written ({error.strerror}); use another folder") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write(handle: IO[bytes], data: Any) -> None:
    handle.write(data)


def _write_tensors(
    handle: IO[bytes], params: Mapping[ParamPath, Any], table: WeightTable, dtype: np.dtype[Any]
) -> None:
    """A safetensors file: the shapes are known from the table, so the header goes first and the data streams."""
    header = json.dumps(_header(table, dtype), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    handle.write(len(header).to_bytes(8, "little") + header)
    for array in _stored_arrays(params, table):
        handle.write(np.array(array, dtype, order="C").reshape(-1).view(np.uint8).data)


def _header(table: WeightTable, dtype: np.dtype[Any]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for source in table.values():
        for name, shape in zip(source.names, source.shapes, strict=True):
            end = begin + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
            begin = end
    return header


def _stored_arrays(params: Mapping[ParamPath, Any], table: WeightTable) -> Iterator[Array]:
    """Every stored tensor in the order of the header; one parameter is on the host at a time."""
    for path, source in table.items():
        arrays = source.split(np.asarray(params[path]))
        shapes = tuple(array.shape for array in arrays)
        assert shapes == source.shapes, f"{path}: split into {shapes}, the table says {source.shapes}"
        yield from arrays
