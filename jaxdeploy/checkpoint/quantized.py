"""Where a checkpoint holds linear maps quantised: the weights that the decoder then has, and how they are read.

A linear map of the decoder may be several modules of the checkpoint. It stays quantised where all of them are, alike,
and the kernels know the result; else it is expanded to floats, and one line says so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import TensorFiles
from jaxdeploy.errors import CheckpointError
from jaxdeploy.formats.quantized import ChannelQuantized, GroupQuantized
from jaxdeploy.formats.registry import Format, SkippedModules, format_of
from jaxdeploy.models.decoder import Decoder, parameters_of
from jaxdeploy.models.linears import put_weight
from jaxdeploy.models.quantized import Int4Weight, Int8Weight
from jaxdeploy.models.weights import Linear, ParamPath, Source, WeightTable
from jaxdeploy.parallel.mesh import TP_AXIS, axis_size
from jaxdeploy.parallel.sharding import RULES
from pallas_kernels.w4a16_matmul.layout import CHUNK, GROUP_SIZES
from pallas_kernels.w4a16_matmul.packing import pack

logger = logging.getLogger("jaxdeploy")

Quantized = GroupQuantized | ChannelQuantized
Held = tuple[Int4Weight | Int8Weight, dict[str, Source]]
"""A weight whose parameters are shapes, and the source of each parameter by attribute."""


def hold_quantized(
    decoder: Decoder, table: WeightTable, files: TensorFiles, config: Mapping[str, Any], mesh: Mesh
) -> dict[ParamPath, Source]:
    """Put the integer weights of a checkpoint, as shapes, into an abstract decoder; return the table of its parameters.

    ``config`` is the checkpoint's ``quantization_config``.

    Raises ``UnsupportedModelError``: a format, or an option of it, that cannot be read.
    """
    params, sources, lost = parameters_of(decoder), dict(table), Counter[str]()
    for path, source, modules in _quantized(table, files, config):
        try:
            weight, own = _held(path, source, modules, params[path], mesh)
        except _CannotKeepError as reason:
            lost[str(reason)] += 1
            sources[path] = _expanded(source, modules)
            continue
        put_weight(decoder, path, weight)
        del sources[path]
        sources |= {(*path, name): leaf for name, leaf in own.items()}
    for why, count in lost.items():
        logger.warning("quantised linear maps expanded to floats: %d; %s", count, why)
    return sources


def expand_quantized(table: WeightTable, files: TensorFiles, config: Mapping[str, Any]) -> dict[ParamPath, Source]:
    """``table`` of a float decoder with linear maps that are stored quantised read as floats.

    Raises ``UnsupportedModelError``: a format, or an option of it, that cannot be read.
    """
    expanded = {path: _expanded(source, modules) for path, source, modules in _quantized(table, files, config)}
    return {**table, **expanded}


def without_zero_biases(files: TensorFiles, table: WeightTable) -> TensorFiles:
    """``files`` less the biases of zeros that AutoGPTQ stores for every module, whether the model has any or not."""
    known = {name for source in table.values() for name in source.names}
    spare = {name for name in files if name.endswith(".bias") and name not in known and not files[name].read().any()}
    return replace(files, tensors={name: ref for name, ref in files.items() if name not in spare})


class _CannotKeepError(Exception):
    """Why a linear map cannot stay quantised."""


@dataclass(frozen=True)
class _Module:
    """One module of the checkpoint: its tensors (suffix → name and shape), and what their arrays mean.

    ``decode`` is ``None`` where it holds a float weight; ``groups`` is the group of each input, where they are
    scattered; ``group_count`` is G, ``None`` for a scale for each output.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    integers: frozenset[str] = frozenset()
    decode: Callable[[Mapping[str, Array]], Quantized] | None = None
    groups: Array | None = None
    group_count: int | None = None

    def quantized(self, arrays: Sequence[Array]) -> Quantized:
        """What ``arrays``, in the order of ``names``, hold."""
        assert self.decode is not None
        return self.decode(dict(zip(self.names, arrays, strict=True)))

    def value(self, arrays: Sequence[Array]) -> Array:
        """The weight [N, K] in floats."""
        return arrays[0] if self.decode is None else self.quantized(arrays).value()


def _quantized(
    table: WeightTable, files: TensorFiles, config: Mapping[str, Any]
) -> Iterator[tuple[ParamPath, Source, list[_Module]]]:
    """The linear maps of which at least one module is stored quantised, with all their modules."""
    reader = _ModuleReader(files, config)
    for path, source in table.items():
        if source.linear is None:
            continue
        linear = source.linear
        sizes = zip(linear.modules, linear.outputs.rows, strict=True)
        expected = path[0] == "layers"
        modules = [reader.module(*size, linear.width, expected=expected) for size in sizes]
        if any(module.decode is not None for module in modules):
            yield path, source, modules


class _ModuleReader:
    """Finds how modules are stored in ``files`` with the quantisation ``config``. Raises ``UnsupportedModelError``."""

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files, self._config = files, config
        self._format: Format = format_of(config)
        self._format.check(config)
        self._skipped = SkippedModules(config)

    def module(self, name: str, outputs: int, inputs: int, *, expected: bool) -> _Module:
        """How a module is stored; where nothing of it is found, quantised if that is ``expected``."""
        files, weight = self._files, f"{name}.weight"
        is_float = weight in files and jnp.issubdtype(files[weight].dtype, np.inexact)
        absent = not expected and not any(tensor.startswith(f"{name}.") for tensor in files)
        if is_float or absent or name in self._skipped:
            return _Module({"weight": weight}, {"weight": (outputs, inputs)})
        wanted = self._format.tensors(outputs, inputs, self._config).items()
        specs = {suffix: spec for suffix, spec in wanted if not spec.optional or f"{name}.{suffix}" in files}
        names = {suffix: f"{name}.{suffix}" for suffix in specs}
        group_of = names.get(self._format.GROUPS or "", "")
        return _Module(
            names,
            {suffix: spec.shape for suffix, spec in specs.items()},
            frozenset(names[suffix] for suffix, spec in specs.items() if spec.kind == "i"),
            lambda arrays: self._format.decode(arrays, outputs, inputs, self._config),
            _scattered(files[group_of].read()) if group_of in files else None,
            self._format.group_count(inputs, self._config),
        )


def _scattered(groups: Array) -> Array | None:
    """The group of each input; ``None`` where they follow each other."""
    return None if bool((np.diff(groups) >= 0).all()) else groups


def _held(path: ParamPath, source: Source, modules: Sequence[_Module], param: nnx.Param[Any], mesh: Mesh) -> Held:
    """The weight in place of the float one at ``path``, and its sources. Raises ``_CannotKeepError``."""
    assert source.linear is not None
    linear = source.linear
    if path[0] != "layers":
        raise _CannotKeepError("only the linear maps of layers have kernels for integers")
    first, inputs = modules[0], len(linear.inputs)
    if any(module.decode is None or module.group_count != first.group_count for module in modules):
        raise _CannotKeepError(f"{_kinds(linear)} are not stored alike")
    if any(not _same(module.groups, first.groups) for module in modules):
        raise _CannotKeepError(f"{_kinds(linear)} order their inputs differently")
    tp = axis_size(mesh, TP_AXIS)
    if first.group_count is None:
        return Int8Weight.abstract(param, inputs, mesh=mesh), _int8(linear, modules)
    if RULES[param.axes[0]] and -(-linear.width // CHUNK) % tp:
        raise _CannotKeepError(f"tp={tp} devices cannot share {linear.width} inputs in multiples of {CHUNK}")
    group = _packed_group(linear.width, first.group_count)
    weight = Int4Weight.abstract(param, inputs, group, ordered=first.groups is not None, mesh=mesh)
    return weight, _int4(linear, modules, group)


def _kinds(linear: Linear) -> str:
    """The modules by the last part of their names, which all layers share."""
    return ", ".join(module.rpartition(".")[2] for module in linear.modules)


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _packed_group(width: int, groups: int) -> int:
    """The largest group size of the packed form of which the stored groups are multiples."""
    stored = width // groups
    for size in GROUP_SIZES:
        if groups == 1 or stored % size == 0:
            return size
    raise _CannotKeepError(f"groups of {stored} inputs are no multiple of {GROUP_SIZES[-1]}")


def _int8(linear: Linear, modules: Sequence[_Module]) -> dict[str, Source]:
    """The sources of the parameters of an ``Int8Weight``, by attribute."""

    def part(name: str) -> Callable[[Sequence[Array]], Array]:
        return lambda arrays: linear.outputs.join([getattr(w, name) for w in _decoded(modules, arrays)])

    return {"values": _source(modules, part("q")), "scales": _source(modules, part("scales"))}


def _int4(linear: Linear, modules: Sequence[_Module], group: int) -> dict[str, Source]:
    """The sources of the parameters of an ``Int4Weight``, by attribute."""
    groups = modules[0].groups
    order = None if groups is None else np.argsort(groups, kind="stable").astype(np.int32)

    def packed(arrays: Sequence[Array]) -> Array:
        return _packed(linear, [w for w in _decoded(modules, arrays) if isinstance(w, GroupQuantized)], group, order)

    held = {"packed": _source(modules, packed)}
    if order is not None:
        held["order"] = _source(modules, lambda _: order)
    return held


def _packed(linear: Linear, weights: Sequence[GroupQuantized], group: int, order: Array | None) -> Array:
    """int32 [C, 16 + 128 / g, *outputs] of the weights of all modules. Raises ``CheckpointError``: no such scales."""
    joined = linear.outputs.join([w.q for w in weights])
    q = np.moveaxis(joined, -1, 0).reshape(linear.width, -1)
    q = q if order is None else q[order]
    padded = -(-linear.width // CHUNK) * CHUNK
    q = np.pad(q, ((0, padded - linear.width), (0, 0)))
    scales, zeros = (_per_group(linear, parts, padded // group, group) for parts in _scales_and_zeros(weights))
    try:
        packed = pack(q, scales, zeros, group)
    except ValueError as error:
        names = ", ".join(linear.modules)
        raise CheckpointError(f"{names}: scales must be finite in float16; download the file again") from error
    return packed.reshape(padded // CHUNK, -1, *joined.shape[:-1])


def _scales_and_zeros(weights: Sequence[GroupQuantized]) -> tuple[list[Array], list[Array]]:
    return [w.scales for w in weights], [w.zeros for w in weights]


def _per_group(linear: Linear, parts: Sequence[Array], count: int, group: int) -> Array:
    """Stored [rows, G] for each module → [``count``, N]: repeated where stored groups are larger, then padded."""
    joined = linear.outputs.join(parts)
    rows = np.moveaxis(joined, -1, 0).reshape(joined.shape[-1], -1)
    repeated = np.repeat(rows, count if len(rows) == 1 else linear.width // len(rows) // group, axis=0)
    return np.pad(repeated, ((0, count - len(repeated)), (0, 0)))


def _expanded(source: Source, modules: Sequence[_Module]) -> Source:
    """The weight in floats, from modules of any kind."""

    def assemble(arrays: Sequence[Array]) -> Array:
        parts = _apart(modules, arrays)
        return source.assemble([module.value(part) for module, part in zip(modules, parts, strict=True)])

    return replace(_source(modules, assemble), linear=source.linear)


def _decoded(modules: Sequence[_Module], arrays: Sequence[Array]) -> list[Quantized]:
    return [module.quantized(part) for module, part in zip(modules, _apart(modules, arrays), strict=True)]


def _apart(modules: Sequence[_Module], arrays: Sequence[Array]) -> Iterator[Sequence[Array]]:
    """The arrays of each module."""
    start = 0
    for module in modules:
        yield arrays[start : start + len(module.names)]
        start += len(module.names)


def _source(modules: Sequence[_Module], assemble: Callable[[Sequence[Array]], Array]) -> Source:
    return Source(
        tuple(name for module in modules for name in module.names.values()),
        tuple(module.shapes[suffix] for module in modules for suffix in module.names),
        assemble,
        _no_way_back,
        frozenset[str]().union(*(module.integers for module in modules)),
    )


def _no_way_back(_: Array) -> list[Array]:
    raise NotImplementedError("quantised weights are written by jaxdeploy.compress")
