"""The op in plain jnp, for any platform and float dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.target import Target
from pallas_kernels.w8a8_matmul.call import W8A8MatmulCall
from pallas_kernels.w8a8_matmul.tiles import Tiles

MIN_PEAK = 1e-30
"""Tokens whose largest magnitude is below count as zeros: no step may be zero, nor its inverse infinite."""


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: W8A8MatmulCall) -> None:
    """Accepts every call."""


def run(call: W8A8MatmulCall, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.w8a8_matmul.w8a8_matmul``; ignores ``tiles``."""
    quantized, steps = quantize_tokens(call.x)
    sums = quantized.astype(jnp.int32) @ call.weight.astype(jnp.int32).T
    return rescale(sums, steps, call.scales, call.bias).astype(call.x.dtype)


def quantize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` [M, K] → (int8 [M, K], step of each token float32 [M])."""
    wide = x.astype(jnp.float32)
    peaks = jnp.maximum(jnp.abs(wide).max(axis=1), MIN_PEAK)
    return jnp.round(wide * (127 / peaks)[:, None]).astype(jnp.int8), peaks / 127


def rescale(sums: jax.Array, steps: jax.Array, scales: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Integer ``sums`` [M, N], worth ``steps`` [M] × ``scales`` [N], and ``bias`` [N] → float32 [M, N]."""
    out = sums.astype(jnp.float32) * (steps[:, None] * scales[None, :])
    return out if bias is None else out + bias.astype(jnp.float32)
