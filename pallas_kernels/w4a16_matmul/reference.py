"""The op spelled out: unpack the weight to float32, multiply."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall
from pallas_kernels.w4a16_matmul.layout import PER_WORD, WORD_ROWS, group_size


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: W4A16MatmulCall) -> None:
    """Accepts every call."""


def run(call: W4A16MatmulCall, tiles: Any = None) -> jax.Array:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; ignores ``tiles``."""
    out = jnp.dot(call.x.astype(jnp.float32), weight(call.packed), precision=lax.Precision.HIGHEST)
    return (out if call.bias is None else out + call.bias.astype(jnp.float32)).astype(call.x.dtype)


def weight(packed: jax.Array) -> jax.Array:
    """The weight float32 [K, N] that ``packed`` int32 [C, 16 + 128/g, N] stands for (C is K / 128)."""
    chunks, _, n = packed.shape
    words, meta = packed[:, None, :WORD_ROWS], packed[:, WORD_ROWS:]
    shifts = 4 * jnp.arange(PER_WORD, dtype=jnp.int32)[:, None, None]
    q = lax.shift_right_logical(words, jnp.broadcast_to(shifts, (chunks, PER_WORD, WORD_ROWS, n))) & 15
    scale = lax.bitcast_convert_type(meta.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    zero = lax.shift_right_logical(meta, jnp.full_like(meta, 16))
    groups = q.reshape(-1, group_size(packed.shape), n)
    shifted = (groups - zero.reshape(-1, 1, n)).astype(jnp.float32)
    return (shifted * scale.reshape(-1, 1, n)).reshape(-1, n)
