"""Keys and values in the blocks of a pool, as they are or quantised per token and head."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedPool:
    """Keys (``[:, 0]``) and values (``[:, 1]``) as unsigned integers, with a scale and a zero for each token and head.

    Attributes:
        values: uint8 [P, 2, K, S, H] for 8 bits. For 4 bits uint8 [P, 2, K, S, H / 2]: byte i holds element i in its
            low half and element i + H / 2 in its high half.
        scales: float16 [P, 2, K, 2, S]: scales at ``[..., 0, :]``, zeros at ``[..., 1, :]``.
        calibrated: ``scales`` were filled for every slot beforehand. A write keeps them, and clips what lies outside.

    An element is ``scale · q + zero``.
    """

    values: jax.Array
    scales: jax.Array
    calibrated: bool = field(default=False, metadata={"static": True})

    def bits(self, head_dim: int) -> int:
        """Bits of an element, 8 or 4, of vectors of H elements."""
        return 8 * self.values.shape[-1] // head_dim


Pool = jax.Array | QuantizedPool
"""A plain pool is an array [P, 2, K, S, H]."""


def stored(pool: Pool) -> jax.Array:
    """The array that holds the elements; its first four dimensions are [P, 2, K, S] in every pool."""
    return pool.values if isinstance(pool, QuantizedPool) else pool


def pool_bits(pool: Pool, head_dim: int) -> int | None:
    """Bits of a stored element, 8 or 4; ``None`` for a pool of floats."""
    return pool.bits(head_dim) if isinstance(pool, QuantizedPool) else None


def block_size(pool: Pool) -> int:
    """S, tokens in a block."""
    return int(stored(pool).shape[3])


def fits(pool: Pool, heads: int, head_dim: int) -> bool:
    """Whether ``pool`` has one of the layouts above, for vectors of H elements and KV heads that divide N ``heads``."""
    values = stored(pool)
    if values.ndim != 5 or values.shape[1] != 2 or heads % values.shape[2]:
        return False
    if not isinstance(pool, QuantizedPool):
        return values.shape[-1] == head_dim and jnp.issubdtype(values.dtype, jnp.floating)
    blocks, _, kv_heads, size, width = values.shape
    dtypes = (values.dtype, pool.scales.dtype) == (jnp.uint8, jnp.float16)
    return dtypes and width in (head_dim, head_dim // 2) and pool.scales.shape == (blocks, 2, kv_heads, 2, size)


def range_of(low: jax.Array, high: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero, both float16, of vectors whose float32 elements lie between ``low`` and ``high``.

    A scale is never 0: that of a constant vector, whose every q is 0, is 1.
    """
    step = ((high - low) / (2**bits - 1)).astype(jnp.float16)
    return jnp.where(step > jnp.float16(0), step, jnp.float16(1)), low.astype(jnp.float16)


def integers(x: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """The q, int32, nearest to float32 ``x``, with what ``range_of`` gave broadcast against it."""
    steps = (x - zero.astype(jnp.float32)) / scale.astype(jnp.float32)
    return (jnp.clip(steps, 0, 2**bits - 1) + 0.5).astype(jnp.int32)


def quantize(x: jax.Array, bits: int, scales: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantise vectors ``x`` [..., H] → (values uint8 [..., H · bits / 8], scales float16 [..., 2]).

    ``scales`` are those to use; ``None`` takes each vector's own range.
    """
    wide = x.astype(jnp.float32)
    if scales is None:
        scales = jnp.stack(range_of(wide.min(axis=-1), wide.max(axis=-1), bits), axis=-1)
    q = integers(wide, scales[..., :1], scales[..., 1:], bits).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(q, 2, axis=-1)
        q = first | (second << 4)
    return q, scales


def dequantize(values: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    """The inverse: ``values`` [..., H · bits / 8] and ``scales`` [..., 2] → float32 [..., H]."""
    if bits == 4:
        values = jnp.concatenate([values & 15, values >> 4], axis=-1)
    scale, zero = (scales[..., i, None].astype(jnp.float32) for i in (0, 1))
    return values.astype(jnp.float32) * scale + zero


def put(pool: Pool, vectors: jax.Array, block: jax.Array, offset: jax.Array) -> Pool:
    """Keys and values ``vectors`` [T, 2, K, H] at ``offset`` in ``block``, int32 [T] each.

    A block beyond the pool is nowhere.
    """
    if not isinstance(pool, QuantizedPool):
        return pool.at[block, :, :, offset].set(vectors.astype(pool.dtype), mode="drop")
    here = (block, slice(None), slice(None), slice(None), offset)
    held = pool.scales.at[here].get(mode="clip") if pool.calibrated else None
    values, scales = quantize(vectors, pool.bits(vectors.shape[-1]), held)
    written = replace(pool, values=pool.values.at[block, :, :, offset].set(values, mode="drop"))
    return written if pool.calibrated else replace(written, scales=pool.scales.at[here].set(scales, mode="drop"))
