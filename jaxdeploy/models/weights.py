"""How the tensors of a checkpoint become parameters: one ``Source`` for each parameter, read when its turn comes.

Checkpoints store a linear map as [out, in]; parameters are [in ..., out ...], with heads and halves as their own axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxdeploy.models.config import ModelConfig

Array = np.ndarray[Any, Any]
ParamPath = tuple[str | int, ...]
WeightTable = Mapping[ParamPath, "Source"]

IGNORED = (r".*rotary_emb\.inv_freq", r".*\.masked_bias", r".*rotary_emb\.(cos|sin)_cached")
"""Checkpoint tensors that hold no weight of ours (regular expressions, whole name)."""


@dataclass(frozen=True)
class Outputs:
    """How the rows of stored [out, in] tensors, or the elements of [out] ones, become the output axes of a parameter.

    ``rows`` says how many each tensor has. ``join`` takes arrays [rows, X], one for each, and gives [*outputs, X], or
    the same without X; ``cut`` is its inverse. X is the input width of a weight; quantised weights have others.
    Tensors lie side by side along the output ``axis``, each with its own of ``shares``.
    """

    rows: tuple[int, ...]
    join: Callable[[Sequence[Array]], Array]
    cut: Callable[[Array], list[Array]]
    axis: int
    shares: tuple[int, ...]


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


def whole(*shape: int) -> Outputs:
    """One tensor, its rows in the order of the parameter's axes."""
    size = math.prod(shape)
    return Outputs(
        (size,),
        lambda arrays: arrays[0].reshape(*shape, *arrays[0].shape[1:]),
        lambda value: [value.reshape(size, *value.shape[len(shape) :])],
        axis=0,
        shares=shape[:1],
    )


def separate_qkv(config: ModelConfig) -> Outputs:
    """Query, key and value stored apart → [K, N/K + 2, H]."""
    kv, group, size = config.num_kv_heads, config.queries_per_kv, config.head_dim
    heads = (group, 1, 1)
    rows = tuple(kv * n * size for n in heads)

    def join(arrays: Sequence[Array]) -> Array:
        parts = [array.reshape(kv, n, size, *array.shape[1:]) for array, n in zip(arrays, heads, strict=True)]
        return np.concatenate(parts, axis=1)

    def cut(value: Array) -> list[Array]:
        parts = np.split(value, (group, group + 1), axis=1)
        return [part.reshape(n, *value.shape[3:]) for part, n in zip(parts, rows, strict=True)]

    return Outputs(rows, join, cut, axis=1, shares=heads)


def grouped_qkv(config: ModelConfig) -> Outputs:
    """One tensor whose rows are, per KV head, its query heads, its key and its value (InternLM2)."""
    return whole(config.num_kv_heads, config.queries_per_kv + 2, config.head_dim)


def gate_and_up(config: ModelConfig) -> Outputs:
    """Gate and up stored apart → [2, F]."""
    return Outputs((config.intermediate_size,) * 2, np.stack, list, axis=0, shares=(1, 1))


@dataclass(frozen=True)
class DecoderNames:
    """What a family calls the tensors of a decoder whose linear maps are stored [out, in]."""

    embedding: str
    norm: str
    head: str
    layer: str
    attention_norm: str
    mlp_norm: str
    qkv: tuple[str, ...]
    out: str
    gate: str
    up: str
    down: str


def decoder_weights(config: ModelConfig, names: DecoderNames, norm: Plain = plain) -> WeightTable:
    """The weight table of a decoder with those names; one name in ``qkv`` means grouped, three mean separate.

    ``norm`` makes the source of a norm's scale, e.g. ``partial(less, 1.0)``.
    """
    size, vocab = config.hidden_size, config.vocab_size
    table: dict[ParamPath, Source] = {
        ("embedding", "table"): plain(f"{names.embedding}.weight", vocab, size),
        ("norm", "scale"): norm(f"{names.norm}.weight", size),
    }
    if not config.tie_embeddings:
        table["head", "weight"] = linear([names.head], (size,), whole(vocab))
    for index in range(config.num_layers):
        layer = _layer_weights(config, names, names.layer.format(index), norm)
        table |= {("layers", index, *path): source for path, source in layer.items()}
    return table


def _layer_weights(config: ModelConfig, names: DecoderNames, prefix: str, norm: Plain) -> dict[tuple[str, ...], Source]:
    size, width = config.hidden_size, config.intermediate_size
    gate, up, down, out = (f"{prefix}.{name}" for name in (names.gate, names.up, names.down, names.out))
    qkv, gate_up = [f"{prefix}.{name}" for name in names.qkv], [gate, up]
    heads = grouped_qkv(config) if len(qkv) == 1 else separate_qkv(config)
    table: dict[tuple[str, ...], Source] = {
        ("attention_norm", "scale"): norm(f"{prefix}.{names.attention_norm}.weight", size),
        ("attention", "wqkv"): linear(qkv, (size,), heads),
        ("attention", "wo"): linear([out], (config.num_heads, config.head_dim), whole(size)),
        ("mlp_norm", "scale"): norm(f"{prefix}.{names.mlp_norm}.weight", size),
        ("mlp", "gate_up"): linear(gate_up, (size,), gate_and_up(config)),
        ("mlp", "down"): linear([down], (width,), whole(size)),
    }
    if config.qkv_bias:
        table["attention", "bqkv"] = bias(qkv, heads)
    if config.o_bias:
        table["attention", "bo"] = bias([out], whole(size))
    if config.mlp_bias:
        table["mlp", "gate_up_bias"] = bias(gate_up, gate_and_up(config))
        table["mlp", "down_bias"] = bias([down], whole(size))
    return table
