"""The op in XLA, which has integer matrix products of its own: any platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.target import Target
from pallas_kernels.w8a8_matmul.call import W8A8MatmulCall
from pallas_kernels.w8a8_matmul.reference import quantize_tokens, rescale
from pallas_kernels.w8a8_matmul.tiles import Tiles


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: W8A8MatmulCall) -> None:
    """Accepts every call."""


def run(call: W8A8MatmulCall, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.w8a8_matmul.w8a8_matmul``; ignores ``tiles``."""
    quantized, steps = quantize_tokens(call.x)
    contract_k = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(quantized, call.weight, contract_k, preferred_element_type=jnp.int32)
    return rescale(sums, steps, call.scales, call.bias).astype(call.x.dtype)
