"""Ways to get a model slightly wrong. Each must push the logits past the tolerance, or the comparison shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Params
from jaxdeploy.models.rope import RopeConfig
from jaxdeploy.models.weights import ParamPath
from tests.tiny_models import attention_of, windows_of
from tests.tiny_models import changed as with_fields

Mutant = tuple[str, ModelConfig, Params]
Window = int | None

UNUSED_WINDOW = 6
"""What files say of a window that does not count, and a usual slip."""


def mutants(config: ModelConfig, params: Params) -> Iterator[Mutant]:
    """Label, configuration and parameters of every slip that this model can show."""
    for label, changed in _weight_slips(config, params):
        yield label, config, {**params, **changed}
    for label, windows in _window_slips(windows_of(config)):
        yield label, with_fields(config, windows=windows), params
    for label, rope in _rope_slips(attention_of(config).rope):
        yield label, with_fields(config, rope=rope), params
    yield "norm_eps", with_fields(config, norm_eps=1e-6), params


def _weight_slips(config: ModelConfig, params: Params) -> Iterator[tuple[str, dict[ParamPath, jax.Array]]]:
    """Slips in one layer's weights, and every norm and bias left out once."""
    wqkv, wo, gate_up = (("layers", 0, *path) for path in (("attention", "wqkv"), ("attention", "wo"), _GATE_UP))
    group, size = attention_of(config).queries_per_kv, attention_of(config).head_dim
    yield "key and value swapped", {wqkv: params[wqkv][:, :, jnp.asarray([*range(group), group + 1, group])]}
    yield "query, key and value in thirds", {wqkv: _thirds(params[wqkv], config)}
    yield "adjacent rotary pairs", {wqkv: _adjacent_pairs(params[wqkv], size)}
    yield "heads of wo reversed", {wo: params[wo][::-1]}
    yield "wo transposed", {wo: jnp.moveaxis(params[wo], 0, 1).reshape(params[wo].shape)}
    yield "gate and up swapped", {gate_up: params[gate_up][:, ::-1]}
    for path, value in params.items():
        if path[-1] == "scale":
            yield f"{path} left out", {path: jnp.ones_like(value)}
        elif path[-1] == "bqkv":
            for part, rows in (("query", slice(group)), ("key", group), ("value", group + 1)):
                yield f"{path} {part} left out", {path: value.at[:, rows].set(0)}
        elif path[-1] in ("bo", "gate_up_bias", "down_bias"):
            yield f"{path} left out", {path: jnp.zeros_like(value)}


_GATE_UP = ("mlp", "gate_up")


def _thirds(wqkv: jax.Array, config: ModelConfig) -> jax.Array:
    """What grouped rows become when they are read as all queries, then all keys, then all values."""
    rows = wqkv.reshape(wqkv.shape[0], -1, wqkv.shape[-1])
    heads, kv = attention_of(config).num_heads, attention_of(config).num_kv_heads
    queries = rows[:, :heads].reshape(wqkv.shape[0], kv, -1, wqkv.shape[-1])
    keys, values = rows[:, heads : heads + kv, None], rows[:, heads + kv :, None]
    if kv == 1:  # one group is in thirds already: an order that differs is keys first
        return jnp.concatenate([keys, queries, values], axis=2)
    return jnp.concatenate([queries, keys, values], axis=2)


def _adjacent_pairs(wqkv: jax.Array, size: int) -> jax.Array:
    """Queries and keys as though the pairs to rotate lay side by side."""
    order = np.arange(size).reshape(-1, 2).T.reshape(-1)
    return wqkv.at[:, :, :-1].set(wqkv[:, :, :-1][..., order])


def _window_slips(windows: tuple[Window, ...]) -> Iterator[tuple[str, tuple[Window, ...]]]:
    for index, window in enumerate(windows):
        wrong: list[Window] = [UNUSED_WINDOW] if window is None else [window - 1, window + 1, None]
        for value in wrong:
            yield f"window {value} in layer {index}", (*windows[:index], value, *windows[index + 1 :])


def _rope_slips(rope: RopeConfig) -> Iterator[tuple[str, RopeConfig]]:
    changes: dict[str, Any] = {"theta": 1.1 * rope.theta}
    match rope.kind:
        case "linear":
            changes |= {"kind": "default", "factor": 1.25 * rope.factor}
        case "dynamic" if rope.original_length < 24:
            changes |= {"kind": "default", "factor": 1.25 * rope.factor, "original_length": 24}
        case "dynamic":  # a short prompt must not be stretched, whatever the factor
            changes |= {"kind": "linear", "original_length": 16}
        case "llama3":
            changes |= {"kind": "default", "factor": 1.25 * rope.factor, "original_length": 2 * rope.original_length}
            changes |= {"low_freq_factor": 2.0, "high_freq_factor": 6.0}
        case "yarn":
            changes |= {"kind": "default", "factor": 1.25 * rope.factor, "original_length": 2 * rope.original_length}
            changes |= {"beta_fast": 1.5, "beta_slow": 0.4, "truncate": not rope.truncate}
            changes |= {"attention_factor": 1.0}
    for name, value in changes.items():
        yield f"rope {name}={value}", replace(rope, **{name: value})
    if rope.attention_factor is not None:
        yield "rope attention_factor ignored", replace(rope, attention_factor=None)
    if rope.mscale:
        yield "rope mscale ignored", replace(rope, mscale=0.0)
        yield "rope mscale_all_dim ignored", replace(rope, mscale_all_dim=0.0)
