"""The interface of a decoder's layer. ``layer.Layer`` is the usual one."""

from __future__ import annotations

from functools import cache
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.attention import AttentionContext
from jaxdeploy.models.cache_layout import CacheLayout
from jaxdeploy.models.linears import LinearSpec
from jaxdeploy.models.rope import PositionScheme, RotaryPositions
from pallas_kernels.kv_pool import Pool


class Block(Protocol):
    """One layer of a decoder."""

    @property
    def cache_layout(self) -> CacheLayout:
        """What the layer keeps in the cache."""
        ...

    def linears(self) -> tuple[LinearSpec, ...]:
        """Return its linear maps, in the order in which they run."""
        ...

    def __call__(
        self,
        x: jax.Array,
        scheme: PositionScheme,
        context: AttentionContext,
        pool: Pool | None,
        selected: jax.Array | None = None,
    ) -> tuple[jax.Array, Pool | None]:
        """Return hidden states [T, D] of ``x`` [T, D], or those of ``selected`` tokens, and the updated ``pool``."""
        ...


class BlockConfig(Protocol):
    """The options of one layer: what attention, what feed-forward, and how they are joined."""

    @property
    def positions(self) -> RotaryPositions:
        """How the layer encodes positions. A step computes the tables of equal layers once."""
        ...

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> Block:
        """Return a layer over hidden states of size ``width``, with random weights."""
        ...

    def with_dynamic_rope(self, factor: float, original_length: int) -> Self:
        """Return the options with dynamic NTK scaling of the rotary embedding."""
        ...

    def shared_by(self, tp: int) -> Self:
        """Return the options for ``tp`` devices that share the layer, with heads repeated if there are too few."""
        ...

    def __hash__(self) -> int:
        """Equal options have equal hashes: layers with equal options share one traced program."""
        ...


@cache
def abstract_block(config: BlockConfig, width: int) -> Block:
    """Return a layer whose parameters are shapes, to ask what it declares. Callers must not change it."""
    return nnx.eval_shape(lambda: config.build(width, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float32)))
