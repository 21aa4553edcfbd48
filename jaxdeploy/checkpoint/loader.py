"""A weight table and tensor files → parameters on devices, one parameter at a time.

Everything that can be wrong is known from the headers, so it is collected and raised before any weight is read. After
that the host holds one parameter at a time: its mapped sources, and the array made from them until it is on devices.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.checkpoint.finite import is_finite
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import TensorFiles
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.leaves import Draw, draw_of
from jaxdeploy.models.weights import IGNORED, ParamPath, Source, WeightTable
from jaxdeploy.progress import progress as report

Axes = tuple[str | None, ...]
ShardingOf = Callable[[Axes, tuple[int, ...]], jax.sharding.Sharding | None]
AbstractParams = Mapping[ParamPath, nnx.Param[Any]]

_TIED_HEADS = (r"lm_head\.weight", r"output\.weight")
_LISTED = 20
_ALIGNMENT = 64
_TITLE = "the checkpoint's files do not fit its config.json; download them again or mend config.json:"


def load_params(
    params: AbstractParams,
    table: WeightTable,
    files: TensorFiles,
    *,
    dtype: Any = None,
    sharding_of: ShardingOf | None = None,
    progress: bool = False,
) -> dict[ParamPath, jax.Array]:
    """The parameters of a decoder, read from ``files``.

    ``params`` are the decoder's parameters as shapes (``abstract_params``), ``dtype`` what float ones are cast to
    (default: their own), ``sharding_of`` the sharding for a parameter's logical axes and shape (None: the default
    device), ``progress`` shows a bar in bytes on stderr; without it the log reports them.

    Raises ``CheckpointError`` that lists every missing or damaged file and every missing, unexpected or mis-shaped
    tensor, before anything is read; or that names a tensor with NaN or infinity, when its turn comes.
    """
    check_tensors(table, files)
    loaded = {}
    total = sum(_bytes_of(source, files) for source in table.values())
    with report("loading weights", "loaded weights", total, "B", bar=progress) as read:
        for path in _in_file_order(table, files):
            loaded[path] = load_param(path, params[path], table[path], files, dtype=dtype, sharding_of=sharding_of)
            read(_bytes_of(table[path], files))
    return loaded


def check_tensors(table: WeightTable, files: TensorFiles) -> None:
    """Raise ``CheckpointError`` that lists everything in which ``files`` and ``table`` differ."""
    if faults := [*_shortened(list(files.faults)), *_tensor_faults(table, files)]:
        raise CheckpointError.collect(_TITLE, faults)


def load_param(
    path: ParamPath,
    param: nnx.Param[Any],
    source: Source,
    files: TensorFiles,
    *,
    dtype: Any = None,
    sharding_of: ShardingOf | None = None,
) -> jax.Array:
    """One parameter on its devices, as ``load_params`` reads it; its host copy is gone when this returns."""
    shape, own = param.get_value().shape, param.get_value().dtype
    kept = np.float32 if source.float32 else own
    value = _host_array(path, source, files, kept if source.integers or source.float32 else dtype or own)
    assert value.shape == shape, f"{path}: the table makes {value.shape} of a parameter {shape}"
    placed: jax.Array = jax.device_put(value, _sharding(param, sharding_of))
    placed.block_until_ready()
    return placed


def dummy_params(
    params: AbstractParams, *, dtype: Any = None, sharding_of: ShardingOf | None = None, seed: int = 0
) -> dict[ParamPath, jax.Array]:
    """Random parameters in place of a checkpoint's: N(0, 0.02²), quantised ones about as large, norm scales 1.

    Each parameter knows how it is drawn (``models.leaves``).

    They are made where they are used, in their own dtype and sharding, and depend on ``seed``, path and shape only.
    """
    return {
        path: _random(param, path, dtype or param.get_value().dtype, _sharding(param, sharding_of), seed)
        for path, param in params.items()
    }


def _random(
    param: nnx.Param[Any], path: ParamPath, dtype: Any, sharding: jax.sharding.Sharding | None, seed: int
) -> jax.Array:
    own = param.get_value()
    drawn = np.dtype(dtype) if jnp.issubdtype(own.dtype, jnp.floating) else own.dtype
    number = zlib.crc32(".".join(map(str, path)).encode())
    return _drawing(draw_of(param), own.shape, drawn, sharding)(jax.random.fold_in(jax.random.key(seed), number))


@cache
def _drawing(
    draw: Draw, shape: tuple[int, ...], dtype: np.dtype[Any], sharding: jax.sharding.Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    """One compiled function for all parameters that look alike: layers share them."""
    return jax.jit(lambda key: draw(key, shape, dtype), out_shardings=sharding)


def _sharding(param: nnx.Param[Any], sharding_of: ShardingOf | None) -> jax.sharding.Sharding | None:
    return None if sharding_of is None else sharding_of(param.axes, param.get_value().shape)


def _in_file_order(table: WeightTable, files: TensorFiles) -> list[ParamPath]:
    """Parameters in the order of their first tensor on disk, so that each shard is read once, from front to back."""

    def place(path: ParamPath) -> tuple[str, int]:
        ref = files[table[path].names[0]]
        return ref.file.name, ref.offset

    return sorted(table, key=place)


def _bytes_of(source: Source, files: TensorFiles) -> int:
    return sum(files[name].nbytes for name in source.names)


def _host_array(path: ParamPath, source: Source, files: TensorFiles, dtype: Any) -> Array:
    """The parameter in C order and target dtype.

    Always a copy of its own and never a view of a mapped file: a CPU device keeps the very array that it is given
    where that is aligned, which spares a second copy, and must not depend on the file.
    """
    stored = [files[name].read() for name in source.names]
    value = source.assemble(stored)
    cast = _aligned(value.shape, np.dtype(dtype))
    with np.errstate(over="ignore"):
        np.copyto(cast, value, casting="unsafe")
    if not is_finite(cast):
        raise _not_finite(path, source.names, stored, cast.dtype)
    return cast


def _not_finite(
    path: ParamPath, names: Sequence[str], stored: Sequence[Array], dtype: np.dtype[Any]
) -> CheckpointError:
    """The error for a parameter with NaN or infinity: stored so, or beyond the range of ``dtype``."""
    bad = [name for name, array in zip(names, stored, strict=True) if not is_finite(np.ascontiguousarray(array))]
    if bad:
        return CheckpointError(f"{', '.join(bad)}: holds values that are not finite; download the weights again")
    name = ".".join(map(str, path))
    return CheckpointError(f"dtype={dtype} cannot hold the values of {name}; use dtype=bfloat16")


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that begins where XLA wants buffers of the host to begin."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _tensor_faults(table: WeightTable, files: TensorFiles) -> list[str]:
    """Every tensor that is missing, has another shape or kind than it should, or should not be there."""
    wanted = {name: shape for source in table.values() for name, shape in _named_shapes(source)}
    integers = frozenset(name for source in table.values() for name in source.integers)
    ignored = (*IGNORED, *(() if ("head", "weight") in table else _TIED_HEADS))
    return [
        *_shortened(_missing(wanted, files)),
        *_shortened(_misfits(wanted, integers, files)),
        *_shortened(_unexpected(wanted, files, ignored)),
    ]


def _named_shapes(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    return zip(source.names, source.shapes, strict=True)


def _missing(wanted: Mapping[str, tuple[int, ...]], files: TensorFiles) -> list[str]:
    """Missing tensors; those of a file that is missing itself are no news, nor is any where it may hold them all."""
    if files.faults and not files.lost:
        return []
    return [f"{name}: missing" for name in wanted if name not in files and name not in files.lost]


def _misfits(wanted: Mapping[str, tuple[int, ...]], integers: Set[str], files: TensorFiles) -> list[str]:
    faults = []
    for name in filter(files.__contains__, wanted):
        ref = files[name]
        if ref.shape != wanted[name]:
            faults.append(f"{name}: shape {list(ref.shape)}, {list(wanted[name])} expected")
        elif jnp.issubdtype(ref.dtype, np.floating) == (name in integers):
            faults.append(f"{name}: dtype {ref.dtype}, {'integers' if name in integers else 'floating point'} expected")
    return faults


def _unexpected(wanted: Mapping[str, tuple[int, ...]], files: TensorFiles, ignored: Sequence[str]) -> list[str]:
    known = re.compile("|".join(ignored))
    return [f"{name}: unexpected" for name in files if name not in wanted and not known.fullmatch(name)]


def _shortened(faults: list[str]) -> list[str]:
    rest = len(faults) - _LISTED
    return faults if rest <= 0 else [*faults[:_LISTED], f"... and {rest} more"]
