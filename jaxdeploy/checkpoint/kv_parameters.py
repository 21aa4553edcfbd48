"""Calibrated ranges of keys and values, one scale and zero point for a layer's keys and one for its values.

LMDeploy v0.3's files (its ``docs/en/quantization/kv_int8.md``): for each layer and tensor-parallel rank
``layers.{layer}.past_kv_scale.{rank}.weight`` holds little-endian float32 k_scale, k_zero_point, v_scale, v_zero_point,
or without the zero points where they are 0. An element is ``scale · q + zero_point`` with q from −128 to 127; a rank
has an even share of the KV heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.atomic import put_file
from jaxdeploy.files.stored import read_bytes
from jaxdeploy.models.cache_layout import CacheLayout

FOLDERS = ("", "triton_models/weights")
"""Places of the files, relative to the folder of a model."""

_NAME = re.compile(r"layers\.(\d{1,4})\.past_kv_scale\.(\d{1,4})\.weight")
_MAX_SIZE = 2**10
"""Bytes of a file that are read."""
_MIN_SCALE = 6e-8
_MAX_FLOAT16 = 65504.0
"""Limits of a scale. The KV cache stores float16."""

Array = np.ndarray[Any, np.dtype[np.float32]]


def read_kv_parameters(folder: Path, layouts: Sequence[CacheLayout]) -> tuple[Any, ...] | None:
    """Return the ranges of each layer, as ``CacheLayout.ranges`` gives them, or ``None`` if the folder has no files.

    Raises:
        CheckpointError: lists every file that is missing, has the wrong size, or holds numbers out of range, and
            what does not fit a layout.
    """
    for below in FOLDERS:
        files = {name: path for path in (folder / below).glob("layers.*.weight") if (name := _place(path))}
        if files:
            return _read(files, layouts)
    return None


def write_kv_parameters(folder: Path, parameters: Array) -> None:
    """Write ``parameters`` float32 [L, 4], k_scale, k_zero_point, v_scale, v_zero_point, as one rank's files.

    Raises ``OSError``.
    """
    for name, row in zip(file_names(len(parameters)), parameters, strict=True):
        put_file(folder / name, methodcaller("write", np.asarray(row, "<f4").tobytes()))


def file_names(num_layers: int) -> list[str]:
    """Return the names of the files that ``write_kv_parameters`` writes for ``num_layers`` layers."""
    return [_name(layer, 0) for layer in range(num_layers)]


def _name(layer: int, rank: int) -> str:
    return f"layers.{layer}.past_kv_scale.{rank}.weight"


def _place(path: Path) -> tuple[int, int] | None:
    """Layer and rank of a file; ``None`` for another file."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2]))


def _read(files: dict[tuple[int, int], Path], layouts: Sequence[CacheLayout]) -> tuple[Any, ...]:
    num_layers, ranks = len(layouts), 1 + max(rank for _, rank in files)
    if ranks > len(files):
        raise CheckpointError(f"{ranks} ranks cannot share {len(files)} files; calibrate again for one rank")
    wanted = {(layer, rank) for layer in range(num_layers) for rank in range(ranks)}
    faults = [f"{_name(*place)}: is missing; calibrate again" for place in sorted(wanted - files.keys())]
    faults += [
        f"{_name(*place)}: the model has {num_layers} layers; calibrate again"
        for place in sorted(files.keys() - wanted)
    ]
    read = np.zeros((num_layers, ranks, 4), np.float32)
    for place in sorted(wanted & files.keys()):
        try:
            read[place] = _read_file(files[place])
        except CheckpointError as error:
            faults.append(str(error))
    ranges = []
    for layout, parameters in zip(layouts, read, strict=True):
        try:
            ranges.append(layout.ranges(parameters))
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError.collect("The KV parameters do not fit:", list(dict.fromkeys(faults)))
    return tuple(ranges)


def _read_file(path: Path) -> Array:
    try:
        raw = read_bytes(path, _MAX_SIZE)
    except FileNotFoundError:  # a broken link
        raise CheckpointError(f"{path.name}: is missing; calibrate again") from None
    if len(raw) not in (8, 16):
        raise CheckpointError(
            f"{path.name}: has {len(raw)} bytes, 16 expected (8 without zero points); calibrate again"
        )
    values = np.frombuffer(raw, "<f4").reshape(2, -1)
    k, v = (np.pad(half, (0, 2 - len(half))) for half in values)
    for scale, zero_point in (k, v):
        if not (_MIN_SCALE <= scale <= _MAX_FLOAT16 and abs(zero_point) + 128 * scale <= _MAX_FLOAT16):
            raise CheckpointError(
                f"{path.name}: scale {scale:g} with zero point {zero_point:g} does not fit float16; calibrate again"
            )
    return np.concatenate([k, v]).astype(np.float32)
