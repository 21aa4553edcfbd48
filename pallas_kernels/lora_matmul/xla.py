"""What CPUs serve adapters with: from token to token, and with each those behind it that have the same adapter.

An adapter is read once for every ``_few`` of its tokens that stand together: whoever lays tokens out puts them so.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.target import Target

FEWEST, MOST = 2, 64
"""Tokens that are multiplied together."""

State = tuple[jax.Array, jax.Array]
"""The next token, int32; and the result so far, float32 [T, N]."""


def check(target: Target) -> None:
    """Runs everywhere."""


def run(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    adapter: jax.Array,
    candidates: jax.Array,
    ranks: jax.Array,
    *,
    tiles: Any = None,
) -> jax.Array:
    """See ``pallas_kernels.lora_matmul.lora_matmul``; needs no ``ranks``, and there are no ``tiles`` to choose."""
    tokens, few = x.shape[0], _few(x.shape[0], candidates.shape[0])
    wide, places = x.astype(jnp.float32), jnp.arange(tokens, dtype=jnp.int32)

    def next_of(waiting: jax.Array) -> jax.Array:
        """The first token that waits; T if none does."""
        return jnp.argmax(jnp.append(waiting, True)).astype(jnp.int32)

    def serve(state: State) -> State:
        """The next tokens, as far as they have the adapter of the first of them."""
        token, out = state
        first, entry = jnp.minimum(token, tokens - few), adapter[token]
        own = lax.dynamic_slice_in_dim(adapter, first, few) == entry
        product = _product(lax.dynamic_slice_in_dim(wide, first, few), a[entry], b[entry])
        before = lax.dynamic_slice_in_dim(out, first, few)
        out = lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], product, before), first, 0)
        served = (places < first + few) & (adapter == entry)
        return next_of((places > token) & (adapter >= 0) & ~served), out

    start = next_of(adapter >= 0), jnp.zeros((tokens, b.shape[2]), jnp.float32)
    return lax.while_loop(lambda state: state[0] < tokens, serve, start)[1].astype(x.dtype)


def _few(tokens: int, adapters: int) -> int:
    """How many tokens are multiplied together: about as many as have the same adapter."""
    share = 1 << (-(-tokens // adapters) - 1).bit_length()
    return min(max(share, FEWEST), MOST, tokens)


def _product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 ``x`` [t, K] · ``a`` [K, R] · ``b`` [R, N] → float32 [t, N]."""
    down = jnp.dot(x, a.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if x.shape[0] > FEWEST:
        return jnp.dot(down, b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return (down[:, :, None] * b.astype(jnp.float32)).sum(axis=1)  # reads b where it lies: a dot would copy it first
