"""Torch's zip checkpoints from hand-written pickle opcodes, so that reading them is tested where torch is not."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}
Array = np.ndarray[Any, np.dtype[Any]]


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tup(*arguments) + b"R"


def numbers(values: tuple[int, ...]) -> bytes:
    return tup(*map(number, values))


def storage(kind: bytes, key: str, size: int) -> bytes:
    return tup(text("storage"), kind, text(key), text("cpu"), number(size)) + b"Q"


def rebuild(held: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *more: bytes) -> bytes:
    """A call of ``_rebuild_tensor_v2``, or of ``_v3`` with a dtype in ``more``."""
    version = "_rebuild_tensor_v3" if more else "_rebuild_tensor_v2"
    hooks = call(glob("collections", "OrderedDict"))
    parts = (held, number(offset), numbers(shape), numbers(strides), b"\x89", hooks, *more)
    return call(glob("torch._utils", version), *parts)


def mapping(items: Mapping[str, bytes]) -> bytes:
    """An OrderedDict with the attribute that state dicts carry."""
    pairs = b"".join(text(name) + value for name, value in items.items())
    metadata = b"}" + text("_metadata") + b"}" + b"s"
    return call(glob("collections", "OrderedDict")) + b"(" + pairs + b"u" + metadata + b"b"


def write_zip(
    file: Path, content: bytes, storages: Mapping[str, bytes], *, root: str = "archive", compression: int = 0
) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + content + b".")
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")
    return file


def write_torch_file(file: Path, tensors: Mapping[str, Array]) -> Path:
    """What ``torch.save`` makes of a state dict whose tensors are contiguous and share nothing."""
    items, storages = {}, {}
    for index, (name, value) in enumerate(tensors.items()):
        strides = tuple(stride // value.itemsize for stride in np.ascontiguousarray(value).strides)
        held = storage(glob("torch", STORAGES[value.dtype]), str(index), value.size)
        items[name] = rebuild(held, 0, value.shape, strides)
        storages[str(index)] = value.tobytes()
    return write_zip(file, mapping(items), storages)
