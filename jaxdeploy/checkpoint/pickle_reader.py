"""PyTorch's zip checkpoints (``torch.save`` since 1.6) without torch and without running what a pickle asks for.

Layout, from torch's ``serialization.py``: a zip archive whose members are stored uncompressed; ``<root>/data.pkl`` is
a pickle of a dict, tensors in it are calls of ``torch._utils._rebuild_tensor_v2`` on storages that are persistent
ids ``("storage", <type>, <key>, <device>, <elements>)``, and ``<root>/data/<key>`` holds a storage's bytes.

The pickle is run by ``PickleMachine``, with ten names, each of which makes a description of a tensor.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxdeploy.checkpoint.pickle_machine import PickleMachine
from jaxdeploy.checkpoint.tensor_ref import DAMAGED, Array, TensorRef, is_allocatable, lfs_hint, map_array
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import check_regular, shown

_STORAGES: Mapping[str, type] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
_DTYPES: Mapping[str, type] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}
_LEGACY_START = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02}", b"\x80\x02c")
_LARGEST_DIRECTORY = 16 * 2**20
_LONGEST_END = 2**16 + 200
_LONGEST_PICKLE = 64 * 2**20
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_torch_file(file: Path) -> dict[str, TensorRef]:
    """The tensors of one ``.bin`` or ``.pth`` file by name; data is mapped when a tensor is read.

    Raises ``CheckpointError``: not a torch zip file, cut short, or its pickle asks for anything but tensors.
    """
    check_regular(file)
    with file.open("rb") as handle:
        records = _records(file, handle)
        prefix, pickled = _pickle_bytes(file, handle, records)
    storages = {name.removeprefix(prefix): span for name, span in records.items() if name.startswith(prefix)}
    content = _unpickle(file, pickled)
    return {name: _reference(file, name, tensor, storages) for name, tensor in _tensors(file, content).items()}


def _records(file: Path, handle: Any) -> dict[str, tuple[int, int]]:
    """Byte span (start, size) of every member of the zip archive.

    Raises ``CheckpointError``: no zip archive, or one with compressed members.
    """
    if _directory_size(handle) > _LARGEST_DIRECTORY:
        raise CheckpointError(f"{file.name}: its zip directory has more than {_LARGEST_DIRECTORY} bytes; {DAMAGED}")
    try:
        with zipfile.ZipFile(handle) as archive:
            members = archive.infolist()
            return {member.filename: _span(file, handle, member) for member in members}
    except zipfile.BadZipFile as error:
        raise CheckpointError(_not_a_zip(file, handle)) from error
    except (NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
        raise CheckpointError(f"{file.name}: its zip directory is damaged ({error}); {DAMAGED}") from error


def _directory_size(handle: BinaryIO) -> int:
    """The size of the zip directory in bytes, as the record at the end of the file says; 0 without a record.

    Archives of more than 4 GB have the size in a record before it.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(size - _LONGEST_END, 0))
    tail = handle.read(_LONGEST_END)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 16:
        return 0
    (found,) = struct.unpack_from("<L", tail, at + 12)
    large = tail.rfind(b"PK\x06\x06", 0, at)
    if large >= 0 and len(tail) >= large + 48:
        found = max(found % 0xFFFF_FFFF, *struct.unpack_from("<Q", tail, large + 40))
    return int(found)


def _not_a_zip(file: Path, handle: Any) -> str:
    handle.seek(0)
    start = handle.read(64)
    if start.startswith(b"PK\x03\x04"):
        return (
            f"{file.name}: truncated: {file.stat().st_size} bytes, the zip directory at its end is missing; {DAMAGED}"
        )
    if start.startswith(_LEGACY_START):
        return f"{file.name}: torch's format from before 1.6 is not read; load and save it with a newer torch"
    return f"{file.name}: not a torch checkpoint; {DAMAGED}{lfs_hint(start)}"


def _span(file: Path, handle: Any, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes lie; the local header's own lengths count, the directory's may differ."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise CheckpointError(f"{file.name}: {member.filename} is compressed or encrypted; torch never writes that")
    handle.seek(member.header_offset)
    header = handle.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(member.filename)
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if start + member.file_size > file.stat().st_size:
        raise zipfile.BadZipFile(member.filename)
    return start, member.file_size


def _pickle_bytes(file: Path, handle: Any, records: Mapping[str, tuple[int, int]]) -> tuple[str, bytes]:
    """The root folder inside the archive (with its slash) and the bytes of its ``data.pkl``."""
    names = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError(f"{file.name}: a zip file without data.pkl is not a torch checkpoint; {DAMAGED}")
    prefix = names[0].removesuffix("data.pkl")
    order = records.get(f"{prefix}byteorder")
    if order is not None and _read(handle, (order[0], min(order[1], 16))) != b"little":
        raise CheckpointError(f"{file.name}: written on a big-endian machine; convert it to safetensors first")
    if records[names[0]][1] > _LONGEST_PICKLE:
        raise CheckpointError(f"{file.name}: data.pkl has more than {_LONGEST_PICKLE} bytes; use a safetensors copy")
    return prefix, _read(handle, records[names[0]])


def _read(handle: Any, span: tuple[int, int]) -> bytes:
    handle.seek(span[0])
    data: bytes = handle.read(span[1])
    return data


class _ElementType(NamedTuple):
    """Stands for ``torch.FloatStorage`` and ``torch.float32`` alike.

    This and the next two are named tuples because a pickle cannot change those after they were checked.
    """

    dtype: np.dtype[Any]
    untyped: bool = False


class _Storage(NamedTuple):
    """A run of elements in the archive; ``size`` counts elements, of one byte where the storage is untyped."""

    element: _ElementType
    key: str
    size: int


class _Tensor(NamedTuple):
    """A strided view of a storage; ``offset`` and ``strides`` count elements."""

    storage: _Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """``collections.OrderedDict``. Python 2 gave its pairs as an argument; entries without a name are left out."""
    if not isinstance(pairs, list | tuple):
        raise CheckpointError("an OrderedDict that is not made of pairs")
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and isinstance(pair[0], str)}


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any = False, hooks: Any = None, *_: Any
) -> _Tensor:
    """``torch._utils._rebuild_tensor_v2``."""
    if not isinstance(storage, _Storage) or storage.element.untyped:
        raise CheckpointError("a tensor without a typed storage")
    return _checked(_Tensor(storage, storage.element.dtype, offset, _integers(shape), _integers(strides)))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    """``torch._utils._rebuild_tensor_v3``: an untyped storage and the dtype beside it."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, _ElementType):
        raise CheckpointError("a tensor without storage or dtype")
    return _checked(_Tensor(storage, dtype.dtype, offset, _integers(shape), _integers(strides)))


def _rebuild_parameter(data: Any, *_: Any) -> _Tensor:
    """``torch._utils._rebuild_parameter``: the tensor itself."""
    if not isinstance(data, _Tensor):
        raise CheckpointError("a parameter that is no tensor")
    return data


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(value) is int and value >= 0 for value in values):
        raise CheckpointError(f"sizes {shown(values)} are not whole numbers")
    return tuple(values)


def _checked(tensor: _Tensor) -> _Tensor:
    """The tensor, once no element of it lies outside its storage: a view past the end would read foreign memory.

    Raises ``CheckpointError``: it does.
    """
    _integers((tensor.offset,))
    if not is_allocatable(tensor.shape):
        raise CheckpointError(f"shape {shown(tensor.shape)} is too large")
    if len(tensor.shape) != len(tensor.strides):
        raise CheckpointError(f"shape {shown(tensor.shape)} with strides {shown(tensor.strides)}")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    available = tensor.storage.size * tensor.storage.element.dtype.itemsize // tensor.dtype.itemsize
    if 0 not in tensor.shape and last >= available:
        raise CheckpointError(
            f"a tensor of shape {shown(tensor.shape)} reaches beyond its storage of {available} elements"
        )
    return tensor


_CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _find_global(module: str, name: str) -> Any:
    """The stand-in for a global.

    Raises ``CheckpointError``: it is none of those that a tensor needs.
    """
    if (module, name) in _CALLS:
        return _CALLS[module, name]
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _ElementType(np.dtype(_STORAGES[name]), untyped=name == "UntypedStorage")
    if module == "torch" and name in _DTYPES:
        return _ElementType(np.dtype(_DTYPES[name]))
    raise CheckpointError(
        f"asks for {module:.60}.{name:.60}, which is no part of a tensor, and was refused; use a safetensors copy"
    )


def _load_storage(pid: Any) -> _Storage:
    """The storage that a persistent id describes.

    Raises ``CheckpointError``: the id is no storage.
    """
    if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[0], str) or pid[0] != "storage":
        raise CheckpointError(f"persistent id {shown(pid)} is no storage")
    _, element, key, _, size = pid[:5]
    if not isinstance(element, _ElementType) or not isinstance(key, str) or type(size) is not int:
        raise CheckpointError(f"persistent id {shown(pid)} is no storage")
    return _Storage(element, key, size)


def _unpickle(file: Path, pickled: bytes) -> Any:
    try:
        return PickleMachine(_find_global, _load_storage).run(pickled)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error}") from error
    except Exception as error:  # a pickle can fail in any way: it calls our stand-ins with arguments of its choice
        raise CheckpointError(f"{file.name}: its pickle is damaged ({error}); {DAMAGED}") from error


def _tensors(file: Path, content: Any) -> dict[str, _Tensor]:
    """The named tensors of a state dict; entries that are none (counters, None) are left out."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name}: holds a {type(content).__name__}, not a dict of tensors")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _reference(file: Path, name: str, tensor: _Tensor, storages: Mapping[str, tuple[int, int]]) -> TensorRef:
    storage = tensor.storage
    start, size = storages.get(f"data/{storage.key}", (0, -1))
    needed = storage.size * storage.element.dtype.itemsize
    if size < needed:
        raise CheckpointError(
            f"{file.name}: truncated: storage of {name} has {max(size, 0)} of {needed} bytes; {DAMAGED}"
        )
    offset = start + tensor.offset * tensor.dtype.itemsize
    return TensorRef(name, tensor.shape, tensor.dtype, file, offset, lambda: _view(file, offset, tensor))


def _view(file: Path, offset: int, tensor: _Tensor) -> Array:
    """The tensor's elements: the span that its strides cross is mapped, and viewed with them."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    flat = map_array(file, offset, (span,), tensor.dtype)
    strides = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
