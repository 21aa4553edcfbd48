"""Parameters → a folder in Hugging Face layout: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.writing import put_json, write_tensors
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.weights import ParamPath, WeightTable
from jaxdeploy.whole_file import put_file


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
    specs = {
        name: (dtype, shape)
        for source in table.values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }
    weights = path / "model.safetensors"
    try:
        put_file(weights, lambda handle: write_tensors(handle, specs, _stored_arrays(params, table)))
        put_json(path / "config.json", config)
    except OSError as error:
        raise CheckpointError(f"save_path={path} cannot be written ({error.strerror}); use another folder") from error


def _stored_arrays(params: Mapping[ParamPath, Any], table: WeightTable) -> Iterator[Array]:
    """Every stored tensor in the order of the header; one parameter is on the host at a time."""
    for path, source in table.items():
        arrays = source.split(np.asarray(params[path]))
        shapes = tuple(array.shape for array in arrays)
        assert shapes == source.shapes, f"{path}: split into {shapes}, the table says {source.shapes}"
        yield from arrays
