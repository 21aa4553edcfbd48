"""Parameters → a folder in Hugging Face layout: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdeploy.checkpoint.marker import add_to_marker, foreign_among
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.writing import put_json, write_tensors
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.atomic import put_file
from jaxdeploy.files.stored import user_path
from jaxdeploy.models.weights import ParamPath, WeightTable

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def check_writable(folder: str | Path, names: Iterable[str] = ()) -> Path:
    """Return the folder as a path, made if it is missing; call it before the work whose result is written there.

    ``names`` are the files and folders that will be written.

    Raises ``CheckpointError``: the folder cannot be written, or holds one of ``names`` that jaxdeploy did not write.
    """
    path = user_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            others = foreign_among(path, names)
    except OSError as error:
        raise CheckpointError(f"save_path={folder} cannot be written ({error.strerror}); use another folder") from error
    if others:
        rule = f"holds {others[0]}, which jaxdeploy did not write"
        raise CheckpointError(f"save_path={folder} {rule}; use another folder")
    return path


def claim(folder: str | Path, command: str, names: Iterable[str]) -> None:
    """Do what ``check_writable`` does, then note in the folder's marker that ``command`` writes ``names``.

    Raises ``CheckpointError``, as ``check_writable`` does.
    """
    path = check_writable(folder, names)
    try:
        add_to_marker(path, command, names)
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
    the configuration last. The files of an earlier call are replaced, those of others never are.

    Raises ``CheckpointError``: the folder cannot be written, it holds such files of others, or ``params`` and ``table``
    name other parameters.
    """
    path, dtype = check_writable(folder, (WEIGHTS, CONFIG)), np.dtype(dtype)
    if odd := sorted(".".join(map(str, name)) for name in params.keys() ^ table.keys()):
        raise CheckpointError(f"parameters {', '.join(odd)} are not both in the model and its weight table; mend them")
    config = {name: value for name, value in hf_config.items() if name != "torch_dtype"} | {"dtype": dtype.name}
    specs = {
        name: (dtype, shape)
        for source in table.values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }
    try:
        add_to_marker(path, "save_checkpoint", (WEIGHTS, CONFIG))
        put_file(path / WEIGHTS, lambda handle: write_tensors(handle, specs, _stored_arrays(params, table)))
        put_json(path / CONFIG, config)
    except OSError as error:
        raise CheckpointError(f"save_path={path} cannot be written ({error.strerror}); use another folder") from error


def _stored_arrays(params: Mapping[ParamPath, Any], table: WeightTable) -> Iterator[Array]:
    """Every stored tensor in the order of the header; one parameter is on the host at a time."""
    for path, source in table.items():
        arrays = source.split(np.asarray(params[path]))
        shapes = tuple(array.shape for array in arrays)
        assert shapes == source.shapes, f"{path}: split into {shapes}, the table says {source.shapes}"
        yield from arrays
