"""How the tensors of a checkpoint become parameters: one ``Source`` for each parameter, read when its turn comes.

Checkpoints store a linear map as [out, in]; parameters are [in ..., out ...], with heads and halves as their own axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdeploy.models.config import ModelConfig

Array = np.ndarray[Any, Any]
ParamPath = tuple[str | int, ...]
WeightTable = Mapping[ParamPath, "Source"]

IGNORED = (r".*rotary_emb\.inv_freq", r".*\.masked_bias", r".*rotary_emb\.(cos|sin)_cached")
"""Checkpoint tensors that hold no weight of ours (regular expressions, whole name)."""


@dataclass(frozen=True)
class Source:
    """The checkpoint tensors of one parameter: ``names`` and ``shapes`` as stored, and the way there and back.

    ``assemble`` turns the stored arrays into the parameter, ``split`` is its inverse.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    assemble: Callable[[Sequence[Array]], Array]
    split: Callable[[Array], list[Array]]


def plain(name: str, *shape: int) -> Source:
    """Stored as it is used: norms, embeddings, biases of whole width."""
    return Source((name,), (shape,), lambda arrays: arrays[0], lambda value: [value])


def linear(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Source:
    """A linear map [*inputs, *outputs], stored as [out, in]."""
    shape = (math.prod(outputs), math.prod(inputs))
    return Source(
        (name,),
        (shape,),
        lambda arrays: arrays[0].T.reshape(*inputs, *outputs),
        lambda value: [value.reshape(shape[1], shape[0]).T],
    )


def separate_qkv(names: Sequence[str], config: ModelConfig, *columns: int) -> Source:
    """Query, key and value stored apart → [D, K, N/K + 2, H]; without ``columns`` (D) the biases [K, N/K + 2, H]."""
    kv, group, size = config.num_kv_heads, config.queries_per_kv, config.head_dim
    heads = (group, 1, 1)
    shapes = tuple((kv * n * size, *columns) for n in heads)

    def assemble(arrays: Sequence[Array]) -> Array:
        parts = [array.reshape(kv, n, size, *columns) for array, n in zip(arrays, heads, strict=True)]
        return _inputs_first(np.concatenate(parts, axis=1), columns)

    def split(value: Array) -> list[Array]:
        parts = np.split(_inputs_last(value, columns), (group, group + 1), axis=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    return Source(tuple(names), shapes, assemble, split)


def grouped_qkv(name: str, config: ModelConfig, *columns: int) -> Source:
    """One tensor whose rows are, per KV head, its query heads, its key and its value (InternLM2)."""
    groups = (config.num_kv_heads, config.queries_per_kv + 2, config.head_dim)
    shape = (math.prod(groups), *columns)
    return Source(
        (name,),
        (shape,),
        lambda arrays: _inputs_first(arrays[0].reshape(*groups, *columns), columns),
        lambda value: [_inputs_last(value, columns).reshape(shape)],
    )


def gate_and_up(gate: str, up: str, config: ModelConfig, *columns: int) -> Source:
    """Gate and up stored apart → [D, 2, F]; without ``columns`` (D) the biases [2, F]."""
    shape = (config.intermediate_size, *columns)
    return Source(
        (gate, up),
        (shape, shape),
        lambda arrays: _inputs_first(np.stack(arrays), columns),
        lambda value: list(_inputs_last(value, columns)),
    )


def _inputs_first(rows: Array, columns: tuple[int, ...]) -> Array:
    """Stored weights end with the input axis (D), parameters begin with it; a bias has none."""
    return np.moveaxis(rows, -1, 0) if columns else rows


def _inputs_last(value: Array, columns: tuple[int, ...]) -> Array:
    return np.moveaxis(value, 0, -1) if columns else value


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


def decoder_weights(config: ModelConfig, names: DecoderNames) -> WeightTable:
    """The weight table of a decoder with those names; one name in ``qkv`` means grouped, three mean separate."""
    size, vocab = config.hidden_size, config.vocab_size
    table: dict[ParamPath, Source] = {
        ("embed", "embedding"): plain(f"{names.embedding}.weight", vocab, size),
        ("norm", "scale"): plain(f"{names.norm}.weight", size),
    }
    if not config.tie_embeddings:
        table["head", "weight"] = linear(f"{names.head}.weight", (size,), (vocab,))
    for index in range(config.num_layers):
        layer = _layer_weights(config, names, names.layer.format(index))
        table |= {("layers", index, *path): source for path, source in layer.items()}
    return table


def _layer_weights(config: ModelConfig, names: DecoderNames, prefix: str) -> dict[tuple[str, ...], Source]:
    size, width = config.hidden_size, config.intermediate_size
    heads = (config.num_heads, config.head_dim)
    gate, up, down, out = (f"{prefix}.{name}" for name in (names.gate, names.up, names.down, names.out))
    qkv = [f"{prefix}.{name}" for name in names.qkv]
    table: dict[tuple[str, ...], Source] = {
        ("attention_norm", "scale"): plain(f"{prefix}.{names.attention_norm}.weight", size),
        ("attention", "wqkv"): _qkv([f"{name}.weight" for name in qkv], config, size),
        ("attention", "wo"): linear(f"{out}.weight", heads, (size,)),
        ("mlp_norm", "scale"): plain(f"{prefix}.{names.mlp_norm}.weight", size),
        ("mlp", "gate_up"): gate_and_up(f"{gate}.weight", f"{up}.weight", config, size),
        ("mlp", "down"): linear(f"{down}.weight", (width,), (size,)),
    }
    if config.qkv_bias:
        table["attention", "bqkv"] = _qkv([f"{name}.bias" for name in qkv], config)
    if config.o_bias:
        table["attention", "bo"] = plain(f"{out}.bias", size)
    if config.mlp_bias:
        table["mlp", "gate_up_bias"] = gate_and_up(f"{gate}.bias", f"{up}.bias", config)
        table["mlp", "down_bias"] = plain(f"{down}.bias", size)
    return table


def _qkv(names: Sequence[str], config: ModelConfig, *columns: int) -> Source:
    if len(names) == 1:
        return grouped_qkv(names[0], config, *columns)
    return separate_qkv(names, config, *columns)
