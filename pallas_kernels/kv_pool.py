"""Keys and values in the blocks of a pool, as they are or quantised per token and head."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedPool:
    """Keys (``[:, 0]``) and values (``[:, 1]``) as unsigned integers, with a scale and a zero for each token and head.

    Attributes:
        values: uint8 [P, 2, K, S, H] for 8 bits. For 4 bits uint8 [P, 2, K, S, H / 2]: byte i holds element i in its low
            half and element i + H / 2 in its high half.
        scales: float16 [P, 2, K, 2, S]: scales at ``[..., 0, :]``, zeros at ``[..., 1, :]``.

    An element is ``scale · q + zero``.
    """

    values: jax.Array
    scales: jax.Array


Pool = jax.Array | QuantizedPool
"""A plain pool is an array [P, 2, K, S, H]."""


def pool_bits(pool: Pool, head_dim: int) -> int | None:
    """Bits of a stored element, 8 or 4; ``None`` for a pool of floats."""
    return 8 * pool.values.shape[-1] // head_dim if isinstance(pool, QuantizedPool) else None


def block_size(pool: Pool) -> int:
    """S, tokens in a block."""
    return int((pool.values if isinstance(pool, QuantizedPool) else pool).shape[3])


def quantize(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Quantise vectors ``x`` [..., H] → (values uint8 [..., H · bits / 8], scales float16 [..., 2])."""
    levels = 2**bits - 1
    wide = x.astype(jnp.float32)
    low, high = wide.min(axis=-1), wide.max(axis=-1)
    zero = low.astype(jnp.float16)
    step = ((high - low) / levels).astype(jnp.float16)
    scale = jnp.where(step > 0, step, jnp.float16(1))
    steps = (wide - zero.astype(jnp.float32)[..., None]) / scale.astype(jnp.float32)[..., None]
    q = jnp.clip(jnp.round(steps), 0, levels).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(q, 2, axis=-1)
        q = first | (second << 4)
    return q, jnp.stack([scale, zero], axis=-1)


def dequantize(values: jax.Array, scales: jax.Array, head_dim: int) -> jax.Array:
    """The inverse: ``values`` [..., H · bits / 8] and ``scales`` [..., 2] → float32 [..., H]."""
    if values.shape[-1] != head_dim:
        values = jnp.concatenate([values & 15, values >> 4], axis=-1)
    scale, zero = (scales[..., i, None].astype(jnp.float32) for i in (0, 1))
    return values.astype(jnp.float32) * scale + zero
