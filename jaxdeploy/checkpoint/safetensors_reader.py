"""Safetensors files: eight bytes of header length, a JSON header, then the data, as the format's README has it.

Read here and not with the library because its numpy side knows no bfloat16, and because the header alone tells whether
a file is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdeploy.checkpoint.tensor_ref import DAMAGED, TensorRef, is_allocatable, lfs_hint, map_array
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import check_regular, parse_json, shown

DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_LENGTH = 8
_MOST_TENSORS = 200_000
_LONGEST_HEADER = 100_000_000


def read_safetensors_file(file: Path) -> dict[str, TensorRef]:
    """The tensors of one file by name; data is mapped when a tensor is read.

    Raises ``CheckpointError``: the file is cut short, or its header does not describe it.
    """
    size = check_regular(file)
    header, start = _header(file, size)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise CheckpointError(f"{file.name}: has {len(header)} tensors, {_MOST_TENSORS} at most; {DAMAGED}")
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    expected = max((ref.offset + ref.nbytes for ref in tensors.values()), default=start)
    if size < expected:
        raise _truncated(file, size, expected)
    return tensors


def _header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the byte at which the data begins."""
    with file.open("rb") as handle:
        length_bytes = handle.read(_LENGTH)
        length = int.from_bytes(length_bytes, "little")
        if size < _LENGTH:
            raise _truncated(file, size, _LENGTH)
        if length > _LONGEST_HEADER:
            hint = lfs_hint(length_bytes + handle.read(56))
            raise CheckpointError(f"{file.name}: not a safetensors file; {DAMAGED}{hint}")
        if size < _LENGTH + length:
            raise _truncated(file, size, _LENGTH + length)
        return parse_json(handle.read(length), f"{file.name}: its header"), _LENGTH + length


def _truncated(file: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(f"{file.name}: truncated: {size} bytes, {expected} expected; {DAMAGED}")


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorRef:
    """The reference that one header entry describes; ``start`` is where the data begins."""
    try:
        kind, shape, (begin, end) = _text(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: header entry of {name} is damaged; {DAMAGED}") from error
    if not whole or not is_allocatable(shape):
        raise CheckpointError(f"{file.name}: header entry of {name} is damaged; {DAMAGED}")
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file.name}: {name} has dtype {kind:.60}, which is not read; known are {', '.join(DTYPES)}"
        )
    offset, dtype = start + begin, DTYPES[kind]
    ref = TensorRef(name, shape, dtype, file, offset, partial(map_array, file, offset, shape, dtype))
    if end - begin != ref.nbytes:
        raise CheckpointError(f"{file.name}: header entry of {name} is damaged; {DAMAGED}")
    return ref


def _text(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)
