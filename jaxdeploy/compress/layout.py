"""Which linear maps are quantised how, and the tensors that a layer becomes on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxdeploy.checkpoint.quantized import expand_quantized
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import TensorFiles
from jaxdeploy.compress.forward import LayerParams
from jaxdeploy.compress.grid import ChannelRounded, Grid, Rounded
from jaxdeploy.compress.weights import FloatModel, within
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.formats.quantized import ChannelQuantized, GroupQuantized
from jaxdeploy.formats.registry import format_named, format_of, is_skipped
from jaxdeploy.models.linears import LinearSpec
from jaxdeploy.models.weights import Linear, Source, WeightTable

GROUP_SIZES = (128, 64, 32)
INT8_BITS = 8
_FORMATS = {
    "awq": ("awq", "compressed-tensors"),
    "gptq": ("gptq", "gptq_v2", "compressed-tensors"),
    "rtn": ("awq", "gptq", "gptq_v2", "compressed-tensors"),
    "smooth_quant": ("smooth_quant",),
    "calibrate": (),
}
"""Method → layouts that its result can be written in, the usual one first."""
_THREE_BITS = ("gptq", "gptq_v2")
_SYMMETRIC = ("gptq", "gptq_v2")
"""Layouts that are usually symmetric: some engines read no other."""


def choose_format(config: QuantConfig) -> str | None:
    """The layout of the result; ``None`` where none can hold it, so that it is only measured.

    Raises ``ConfigError``: method, bits and format do not go together.
    """
    known = _FORMATS[config.method]
    if config.method in ("awq", "gptq", "rtn") and config.w_bits == INT8_BITS:
        raise ConfigError(f"w_bits=8 is for smooth_quant, not {config.method}; give 3 or 4")
    if config.method in ("awq", "gptq", "rtn") and config.w_bits == 3:
        known = tuple(name for name in known if name in _THREE_BITS)
    if config.format is not None and config.format not in known:
        fits = f"choose one of {', '.join(known)}" if known else "leave it out"
        raise ConfigError(f"format={config.format} cannot hold {config.method} at {config.w_bits} bits; {fits}")
    return config.format or next(iter(known), None)


@dataclass(frozen=True)
class Layout:
    """How the layers of a model are quantised and written.

    ``grids`` are those of the linear maps to quantise, by name; ``kept`` says why a module stays float, by its name in
    a layer. ``quantization`` is what ``config.json`` gets, ``None`` where nothing is written quantised.
    """

    grids: Mapping[str, Grid]
    kept: Mapping[str, str]
    quantization: Mapping[str, Any] | None
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, model: FloatModel, config: QuantConfig) -> Layout:
        """Decide. Raises ``ConfigError`` where nothing is left to quantise."""
        chosen = choose_format(config)
        if config.method == "calibrate":
            return cls({}, {}, None, model.dtype)
        linears = _linears(model)
        bits = INT8_BITS if config.method == "smooth_quant" else config.w_bits
        symmetric = chosen in _SYMMETRIC if config.w_sym is None else config.w_sym
        kept = dict(_asked_for(linears, config))
        group = _group_size([linear.width for name, linear in linears.items() if name not in kept], config)
        kept |= _misfits({name: linear for name, linear in linears.items() if name not in kept}, bits, group)
        whole = group == -1 or bits == INT8_BITS
        grids = {
            name: Grid(bits, linear.width if whole else group, symmetric, least_zero=int(chosen == "gptq"))
            for name, linear in linears.items()
            if name not in kept
        }
        reasons = {module: kept[name] for name in kept for module in _in_layer(linears[name])}
        if not grids:
            why = "; ".join(sorted(set(kept.values())))
            raise ConfigError(f"w_group_size={group} leaves nothing to quantise ({why}); choose another model")
        if chosen is None:
            return cls(grids, reasons, None, model.dtype)
        quantization = format_named(chosen).describe(
            bits=bits,
            group_size=group,
            symmetric=symmetric,
            act_order=config.method == "gptq" and config.act_order and not config.static_groups,
            skipped=sorted({*reasons, *_heads(model)}),
        )
        return cls(grids, reasons, quantization, model.dtype)

    def expected_bytes(self, model: FloatModel) -> int:
        """About how large the result will be on disk."""
        saved_bits = sum(
            spec.width * math.prod(spec.outputs) * (8 * self.dtype.itemsize - self.grids[spec.name].bits - 1)
            for index in range(model.config.num_layers)
            for spec in model.linears(index)
            if spec.name in self.grids
        )
        return model.nbytes - saved_bits // 8

    def tensors(
        self,
        specs: Sequence[LinearSpec],
        sources: Mapping[tuple[str, ...], Source],
        params: LayerParams,
        rounded: Mapping[str, Rounded | ChannelRounded],
    ) -> dict[str, Array]:
        """What a layer becomes on disk: quantised linear maps in the chosen format, the rest as floats."""
        names = {spec.path: spec.name for spec in specs}
        tensors: dict[str, Array] = {}
        for path, source in sources.items():
            name = names.get(path, "")
            if name in rounded:
                tensors |= self._integers(name, source, params[path].shape, rounded[name])
            else:
                tensors |= self.floats(source, params[path])
        return tensors

    def params(self, model: FloatModel, index: int, files: TensorFiles) -> LayerParams:
        """The inverse: a layer's parameters, float32, as its tensors in ``files`` say."""
        sources: WeightTable = {("layers", index, *path): source for path, source in model.sources(index).items()}
        if self.quantization is not None:
            sources = expand_quantized(sources, files, self.quantization)
        return {within(path): model.read(path, source, files) for path, source in sources.items()}

    def floats(self, source: Source, value: jax.Array) -> dict[str, Array]:
        """The tensors of a parameter that stays float."""
        parts = source.split(np.asarray(value))
        return {name: part.astype(self.dtype) for name, part in zip(source.names, parts, strict=True)}

    def _integers(
        self, name: str, source: Source, shape: tuple[int, ...], stored: Rounded | ChannelRounded
    ) -> dict[str, Array]:
        assert self.quantization is not None
        assert source.linear is not None
        chosen, linear = format_of(self.quantization), source.linear
        weights = _module_weights(linear, shape, stored, self.grids[name].bits)
        return {
            f"{module}.{suffix}": array
            for module, weight in zip(linear.modules, weights, strict=True)
            for suffix, array in chosen.encode(weight, self.quantization).items()
        }


def _module_weights(
    linear: Linear, shape: tuple[int, ...], stored: Rounded | ChannelRounded, bits: int
) -> Iterator[GroupQuantized | ChannelQuantized]:
    """The weight of each module of a linear map with a parameter of ``shape``."""
    outputs = shape[len(linear.inputs) :]

    def cut(array: jax.Array) -> list[Array]:
        """[X, N] or [N] → [rows, X] or [rows] for each module."""
        values = np.asarray(array)
        return linear.outputs.cut(np.moveaxis(values, 0, values.ndim - 1).reshape(*outputs, *values.shape[:-1]))

    if isinstance(stored, ChannelRounded):
        yield from map(ChannelQuantized, cut(stored.q), cut(stored.scales))
        return
    groups = None if stored.groups is None else np.asarray(stored.groups)
    for q, scales, zeros in zip(cut(stored.q), cut(stored.scales), cut(stored.zeros), strict=True):
        yield GroupQuantized(q, scales, zeros, bits, groups)


def _linears(model: FloatModel) -> dict[str, Linear]:
    """The linear maps of the layers by name; those of one name are alike in all layers."""
    found: dict[str, Linear] = {}
    for layer in dict.fromkeys(model.config.layers):
        index = model.config.layers.index(layer)
        sources = model.sources(index)
        for spec in model.linears(index):
            linear = sources[spec.path].linear
            assert linear is not None
            found.setdefault(spec.name, linear)
    return found


def _in_layer(linear: Linear) -> list[str]:
    """Module names without what says which layer: ``mlp.down_proj``."""
    return [re.sub(r"^.*?\.\d+\.", "", module) for module in linear.modules]


def _asked_for(linears: Mapping[str, Linear], config: QuantConfig) -> Iterator[tuple[str, str]]:
    """Those that the user wants to stay float. Raises ``ConfigError`` for a name that is none of them."""
    for entry in config.modules_to_not_convert or ():
        named = [
            name
            for name, linear in linears.items()
            if any(is_skipped(module, {"modules_to_not_convert": [entry]}) for module in linear.modules)
        ]
        if not named and entry != "lm_head":
            known = ", ".join(module for linear in linears.values() for module in _in_layer(linear))
            raise ConfigError(f"modules_to_not_convert={entry!r} is no linear map of a layer; choose from {known}")
        yield from ((name, "modules_to_not_convert") for name in named)


def _group_size(widths: Sequence[int], config: QuantConfig) -> int:
    """The largest group, up to what is asked for, that divides every width that 32 divides."""
    if config.w_group_size == -1:
        return -1
    sizes = [size for size in GROUP_SIZES if size <= config.w_group_size]
    regular = [width for width in widths if width % GROUP_SIZES[-1] == 0]
    return next((size for size in sizes if all(width % size == 0 for width in regular)), GROUP_SIZES[-1])


def _misfits(linears: Mapping[str, Linear], bits: int, group: int) -> dict[str, str]:
    """Linear maps whose sizes the formats cannot hold, with the reason."""
    if bits == INT8_BITS:
        return {}
    reasons = {}
    for name, linear in linears.items():
        if linear.width % (GROUP_SIZES[-1] if group == -1 else group):
            reasons[name] = f"no group of 32 or more divides its {linear.width} inputs"
        elif any(rows % GROUP_SIZES[-1] for rows in linear.outputs.rows):
            reasons[name] = f"32 does not divide its outputs {linear.outputs.rows}"
    return reasons


def _heads(model: FloatModel) -> Iterator[str]:
    """The output projection, where its name does not say that it is one."""
    head = model.table.get(("head", "weight"))
    if head is not None and head.linear is not None:
        yield from (module for module in head.linear.modules if module != "lm_head")
