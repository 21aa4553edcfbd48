"""A tensor that still lies in its file: name, shape and dtype are known, the data is read when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdeploy.errors import CheckpointError

DAMAGED = "download it again"
_MOST_AXES = 32
_MOST_ELEMENTS = 2**60
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a checkpoint.

    ``read`` gives a read-only view into the mapped file where the layout allows it: it costs no memory until it is
    touched, and the mapping goes away with the array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path
    offset: int
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_allocatable(shape: tuple[int, ...]) -> bool:
    """Whether numpy takes such a shape: not too many axes, none of them too long, even beside axes of length 0."""
    return len(shape) <= _MOST_AXES and math.prod(max(length, 1) for length in shape) < _MOST_ELEMENTS


def map_array(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The ``shape`` elements of ``dtype`` that lie at byte ``offset`` of ``file``, mapped read-only."""
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    mapped = np.memmap(file, np.uint8, "r", offset, (count * dtype.itemsize,))
    return np.asarray(mapped).view(dtype).reshape(shape)


def lfs_hint(start: bytes) -> str:
    """What to add to a complaint about a file that begins with ``start``: a clone without LFS leaves pointers."""
    return " (it is a Git LFS pointer: run `git lfs pull`)" if start.startswith(b"version https://git-lfs") else ""


def read_file(read: Callable[[Path], dict[str, TensorRef]], file: Path) -> dict[str, TensorRef]:
    """``read(file)``, with what the file system objects to as one line.

    Raises ``CheckpointError``: the file is missing, unreadable or damaged.
    """
    try:
        return read(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name}: missing; {DAMAGED}") from error
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror}); mend that and try again") from error
