"""How the tensors of a checkpoint become parameters: one ``Source`` for each parameter, read when its turn comes.

Checkpoints store a linear map as [out, in]; parameters are [in ..., out ...], with heads and halves as their own axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from jaxdeploy.models.block import BlockConfig, abstract_block
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.linears import LinearSpec, Outputs, whole
from jaxdeploy.parallel.mesh import TP_AXIS
from jaxdeploy.parallel.sharding import RULES, check_divisible

Array = np.ndarray[Any, Any]
ParamPath = tuple[str | int, ...]
WeightTable = Mapping[ParamPath, "Source"]

IGNORED = (r".*rotary_emb\.inv_freq", r".*\.masked_bias", r".*rotary_emb\.(cos|sin)_cached")
"""Checkpoint tensors that hold no weight of ours (regular expressions, whole name)."""


@dataclass(frozen=True)
class Linear:
    """A linear map [*inputs, *outputs] and the ``modules`` of the checkpoint that it is made of."""

    modules: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: Outputs

    @property
    def width(self) -> int:
        """Number of inputs, all input axes together."""
        return math.prod(self.inputs)


@dataclass(frozen=True)
class Source:
    """The checkpoint tensors of one parameter: ``names`` and ``shapes`` as stored, and the way there and back.

    ``assemble`` turns the stored arrays into the parameter, ``split`` is its inverse. ``integers`` are the names that
    hold integers; the others hold floats. ``linear`` says more about the weight of a linear map: it may be stored
    quantised instead. ``float32`` keeps the parameter in that dtype, whatever the dtype of the model.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    assemble: Callable[[Sequence[Array]], Array]
    split: Callable[[Array], list[Array]]
    integers: frozenset[str] = frozenset()
    linear: Linear | None = None
    float32: bool = False

    def rounded(self, value: Array, dtype: np.dtype[Any]) -> Array:
        """Return the parameter ``value`` as it is after writing its stored arrays in ``dtype``, float32."""
        stored = [part.astype(dtype) for part in self.split(np.asarray(value, np.float32))]
        return np.asarray(self.assemble(stored), np.float32)


Plain = Callable[..., Source]
"""``plain``, or a function with the same arguments."""


def plain(name: str, *shape: int) -> Source:
    """Stored as it is used: norms, embeddings, biases of whole width."""
    return Source((name,), (shape,), lambda arrays: arrays[0], lambda value: [value])


def less(offset: float, name: str, *shape: int) -> Source:
    """Stored as the parameter less ``offset``, as Gemma stores its norms with 1; the parameter is kept in float32.

    Both directions compute in float32, so only the stored array is rounded.
    """
    return Source(
        (name,),
        (shape,),
        lambda arrays: arrays[0].astype(np.float32) + np.float32(offset),
        lambda value: [value.astype(np.float32) - np.float32(offset)],
        float32=True,
    )


def linear(modules: Sequence[str], inputs: tuple[int, ...], outputs: Outputs) -> Source:
    """The weight [*inputs, *outputs] of a linear map, stored as a tensor [out, in] for each module."""
    width = math.prod(inputs)

    def assemble(arrays: Sequence[Array]) -> Array:
        joined = outputs.join(arrays)
        return np.moveaxis(joined, -1, 0).reshape(*inputs, *joined.shape[:-1])

    def split(value: Array) -> list[Array]:
        return outputs.cut(np.moveaxis(value.reshape(width, *value.shape[len(inputs) :]), 0, -1))

    return Source(
        tuple(f"{module}.weight" for module in modules),
        tuple((rows, width) for rows in outputs.rows),
        assemble,
        split,
        linear=Linear(tuple(modules), inputs, outputs),
    )


def output_major(source: Source) -> Source:
    """``source`` of a weight [*inputs, *outputs], to be read as [*outputs, K]: as it is stored, nothing moves."""
    assert source.linear is not None, "only the weights of linear maps have inputs and outputs"
    inputs = source.linear.inputs

    def assemble(arrays: Sequence[Array]) -> Array:
        value = source.assemble(arrays)
        return np.moveaxis(value.reshape(-1, *value.shape[len(inputs) :]), 0, -1)

    def split(rows: Array) -> list[Array]:
        return source.split(np.moveaxis(rows, -1, 0).reshape(*inputs, *rows.shape[:-1]))

    return replace(source, assemble=assemble, split=split)


def bias(modules: Sequence[str], outputs: Outputs) -> Source:
    """The bias [*outputs] of a linear map, stored as a tensor [out] for each module."""
    names = tuple(f"{module}.bias" for module in modules)
    return Source(names, tuple((rows,) for rows in outputs.rows), outputs.join, outputs.cut)


@dataclass(frozen=True)
class DecoderNames:
    """What a family calls the tensors of a decoder whose linear maps are stored [out, in].

    ``embedding``, ``norm``, ``head``: modules outside of the layers.
    ``layer``: prefix of a layer's modules, with ``{}`` for its index.
    ``norms``: the modules of a layer's norms, by attribute of our block.
    ``linears``: the modules of a layer's linear maps. A key is the name of a part of ``LinearSpec.parts``, or the name
    of a linear map, where one tensor holds all its outputs in the order of our axes.
    """

    embedding: str
    norm: str
    head: str
    layer: str
    norms: Mapping[str, str]
    linears: Mapping[str, str]


def decoder_weights(config: ModelConfig, names: DecoderNames, norm: Plain = plain) -> WeightTable:
    """Return the weight table of a decoder with those names.

    ``norm`` makes the source of a norm's scale, e.g. ``partial(less, 1.0)``.
    """
    size, vocab = config.hidden_size, config.vocab_size
    table: dict[ParamPath, Source] = {
        ("embedding", "table"): plain(f"{names.embedding}.weight", vocab, size),
        ("norm", "scale"): norm(f"{names.norm}.weight", size),
    }
    if not config.tie_embeddings:
        table["head", "weight"] = linear([names.head], (size,), whole(vocab))
    for index, layer in enumerate(config.layers):
        prefix = names.layer.format(index)
        for path, source in block_weights(declared(layer, size), names, prefix, size, norm).items():
            table["layers", index, *path] = source
    return table


@cache
def declared(layer: BlockConfig, width: int) -> tuple[LinearSpec, ...]:
    """Return the linear maps of a layer with hidden states of size ``width``."""
    return abstract_block(layer, width).linears()


def tensor_parallel(config: ModelConfig, tp: int) -> ModelConfig:
    """Return ``config`` for ``tp`` devices that share each layer: KV heads are repeated until ``tp`` divides them.

    Raises ``ConfigError`` if ``tp`` does not divide another size.
    """
    check_divisible(tp, {axis: sizes for axis, sizes in _shared_sizes(config).items() if axis != "kv_heads"})
    shared = replace(config, layers=tuple(layer.shared_by(tp) for layer in config.layers))
    check_divisible(tp, _shared_sizes(shared))
    return shared


def _shared_sizes(config: ModelConfig) -> dict[str, set[int]]:
    """Return the sizes of the axes that tensor-parallel devices share, by logical axis."""
    sizes: dict[str, set[int]] = {}
    for layer in dict.fromkeys(config.layers):
        for spec in declared(layer, config.hidden_size):
            for axis, size in zip(spec.axes, (*spec.inputs, *spec.outputs), strict=True):
                if axis is not None and RULES[axis] == TP_AXIS:
                    sizes.setdefault(axis, set()).add(size)
    return sizes


def has_biased_keys(config: ModelConfig) -> bool:
    """Return whether a linear map whose outputs enter the cache has a bias."""
    specs = (spec for layer in dict.fromkeys(config.layers) for spec in declared(layer, config.hidden_size))
    return any(spec.feeds_cache and spec.bias is not None for spec in specs)


def block_weights(
    specs: Sequence[LinearSpec], names: DecoderNames, prefix: str, size: int, norm: Plain = plain
) -> dict[tuple[str, ...], Source]:
    """Return the weight table of the layer whose modules begin with ``prefix``, by path within the layer."""
    table: dict[tuple[str, ...], Source] = {
        (attribute, "scale"): norm(f"{prefix}.{module}.weight", size) for attribute, module in names.norms.items()
    }
    for spec in specs:
        together = spec.name in names.linears
        parts = (spec.name,) if together else spec.parts
        modules = [f"{prefix}.{names.linears[part]}" for part in parts]
        outputs = (spec.joined or whole(*spec.outputs)) if together else spec.fused
        table[spec.path] = linear(modules, spec.inputs, outputs)
        if spec.bias_path is not None:
            table[spec.bias_path] = bias(modules, outputs)
    return table
