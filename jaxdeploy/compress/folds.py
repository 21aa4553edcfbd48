"""Scalings of a decoder layer that move size from activations into weights and leave its outputs as they are.

They follow from how a layer is built, so they hold for every family of it: the inputs of ``wqkv`` and ``gate_up`` come
from a norm, those of ``wo`` from the values, those of ``down`` from ``up``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdeploy.models.config import ModelConfig

Params = MutableMapping[tuple[str, ...], jax.Array]
Rows = Callable[[str, jax.Array], None]
"""Multiplies the rows of a linear map, by name, with factors [K]."""
Rounded = Callable[[tuple[str, ...], jax.Array], jax.Array]
"""A parameter, by path, as it is after it was written to a checkpoint and read again."""


@dataclass(frozen=True)
class NormFold:
    """Norm → linear map. The norm's scale is divided and ``rounded``; the rows make up for the rounding."""

    linear: str
    norm: str
    params: Params
    rounded: Rounded
    multiply_rows: Rows

    def tie(self, values: jax.Array) -> jax.Array:
        """Every channel has a factor of its own."""
        return values

    def apply(self, factors: jax.Array) -> None:
        """See ``layer_view.Fold``."""
        old = self.params[self.norm, "scale"]
        new = self.rounded((self.norm, "scale"), old / factors)
        self.params[self.norm, "scale"] = new
        self.multiply_rows(self.linear, jnp.where(new == 0, 1.0, old / jnp.where(new == 0, 1.0, new)))


@dataclass(frozen=True)
class ValueFold:
    """Values → ``wo``. The query heads that share a KV head share its factors (grouped-query attention)."""

    config: ModelConfig
    params: Params
    multiply_rows: Rows
    linear: str = "wo"

    def tie(self, values: jax.Array) -> jax.Array:
        """The mean over the query heads of a KV head."""
        heads = self._per_kv_head(values)
        return jnp.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)

    def apply(self, factors: jax.Array) -> None:
        """See ``layer_view.Fold``."""
        per_value = self._per_kv_head(factors)[:, 0]
        for name in ("wqkv", "bqkv"):
            if ("attention", name) in self.params:
                weight = self.params["attention", name]
                self.params["attention", name] = weight.at[..., -1, :].divide(per_value)
        self.multiply_rows(self.linear, factors)

    def _per_kv_head(self, values: jax.Array) -> jax.Array:
        return values.reshape(self.config.num_kv_heads, self.config.queries_per_kv, self.config.head_dim)


@dataclass(frozen=True)
class UpFold:
    """Up → ``down``: the gate multiplies what up gives, so up's outputs can be scaled."""

    params: Params
    multiply_rows: Rows
    linear: str = "down"

    def tie(self, values: jax.Array) -> jax.Array:
        """Every channel has a factor of its own."""
        return values

    def apply(self, factors: jax.Array) -> None:
        """See ``layer_view.Fold``."""
        for name in ("gate_up", "gate_up_bias"):
            if ("mlp", name) in self.params:
                weight = self.params["mlp", name]
                self.params["mlp", name] = weight.at[..., 1, :].divide(factors)
        self.multiply_rows(self.linear, factors)


def folds(
    config: ModelConfig, params: Params, rounded: Rounded, multiply_rows: Rows
) -> Iterator[NormFold | ValueFold | UpFold]:
    """The scalings of a layer with ``params``, in the order in which its maps run."""
    yield NormFold("wqkv", "attention_norm", params, rounded, multiply_rows)
    yield ValueFold(config, params, multiply_rows)
    yield NormFold("gate_up", "mlp_norm", params, rounded, multiply_rows)
    yield UpFold(params, multiply_rows)
