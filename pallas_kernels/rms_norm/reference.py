"""The op in plain jnp, for any platform and float dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm.call import RMSNormCall
from pallas_kernels.rms_norm.tiles import Tiles
from pallas_kernels.target import Target


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: RMSNormCall) -> None:
    """Accepts every call."""


def run(call: RMSNormCall, tiles: Tiles | None = None) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See ``pallas_kernels.rms_norm.rms_norm``; ignores ``tiles``."""
    dtype = call.x.dtype
    wide = call.x.astype(jnp.float32)
    if call.residual is not None:
        wide = rounded(wide + call.residual.astype(jnp.float32), dtype)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + call.eps)
    out = normed.astype(dtype) * call.scale
    return out if call.residual is None else (out, wide.astype(dtype))


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 ``x`` with the precision of ``dtype``: XLA leaves out conversions there and back again."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
