"""The op in plain jnp, for any platform and float dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm.tiles import Tiles
from pallas_kernels.target import Target


def check(target: Target) -> None:
    """Runs everywhere."""


def run(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None, *, eps: float, tiles: Tiles | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See ``pallas_kernels.rms_norm.rms_norm``; there are no tiles to choose."""
    wide = x.astype(jnp.float32)
    if residual is not None:
        wide = rounded(wide + residual.astype(jnp.float32), x.dtype)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    out = normed.astype(x.dtype) * scale
    return out if residual is None else (out, wide.astype(x.dtype))


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 ``x`` with the precision of ``dtype``: XLA leaves out conversions there and back again."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
