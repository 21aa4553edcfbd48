"""The op in XLA, which has integer matrix products of its own: any platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.target import Target
from pallas_kernels.w8a8_matmul.reference import quantize_tokens, rescale
from pallas_kernels.w8a8_matmul.tiles import Tiles


def check(target: Target) -> None:
    """Runs everywhere."""


def run(
    x: jax.Array, weight: jax.Array, scales: jax.Array, bias: jax.Array | None, *, tiles: Tiles | None = None
) -> jax.Array:
    """See ``pallas_kernels.w8a8_matmul.w8a8_matmul``; XLA chooses the tiles."""
    quantized, steps = quantize_tokens(x)
    contract_k = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(quantized, weight, contract_k, preferred_element_type=jnp.int32)
    return rescale(sums, steps, scales, bias).astype(x.dtype)
