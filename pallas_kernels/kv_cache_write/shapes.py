"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_cache_write.call import KVCacheWriteCall
from pallas_kernels.kv_cache_write.tiles import Tiles, candidates, choose, key
from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.model_sizes import DISTINCT
from pallas_kernels.offline.devices import DEVICES


@dataclass(frozen=True)
class Shape:
    """T tokens, written to slots in any order; of ``padding`` ones, the last, the slot lies beyond the pool.

    ``calibrated``: the pool's scales are fixed, and narrower than what is written.
    """

    model: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    kv: str = "bf16"
    block_size: int = 64
    padding: int = 0
    dtype: str = "bfloat16"
    bar: bool = False
    calibrated: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.tokens <= 256 else "prefill"

    @property
    def bits(self) -> int | None:
        """Bits of a quantised element."""
        return None if self.kv == "bf16" else int(self.kv.removeprefix("int"))

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def blocks(self) -> int:
        """P: room for twice the tokens."""
        return int(pl.cdiv(2 * self.tokens, self.block_size))

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}x{self.head_dim}"
        return f"{self.model} T={self.tokens} heads={heads} S={self.block_size} {self.kv} {self.dtype}"


SHAPES = tuple(
    Shape(model, tokens, sizes.heads, sizes.kv_heads, sizes.head_dim, kv)
    for model, sizes in DISTINCT.items()
    for kv in ("bf16", "int8", "int4")
    for tokens in (16, 256, 8192)
)

TEST_SHAPES = (
    Shape("one token", 1, 4, 2, 64),
    Shape("padding", 21, 6, 2, 80, block_size=16, padding=3, dtype="float16"),
    Shape("8 bits", 9, 4, 2, 64, "int8", block_size=16, padding=1),
    Shape("8 bits, padded lanes", 9, 3, 1, 80, "int8", block_size=16, dtype="float32"),
    Shape("4 bits", 17, 4, 4, 96, "int4", block_size=32, padding=2),
    Shape("8 bits, calibrated", 9, 4, 2, 64, "int8", block_size=16, padding=1, calibrated=True),
    Shape("4 bits, calibrated", 5, 3, 1, 80, "int4", block_size=16, padding=1, calibrated=True),
    Shape("float32", 5, 7, 1, 32, block_size=16, dtype="float32"),
)


def make_call(shape: Shape, seed: int = 0) -> KVCacheWriteCall:
    """Return a call of ``shape``, drawn on the device. The pool is not 0 before the write."""
    keys = jax.random.split(jax.random.key(seed), 3)
    vectors = (shape.tokens, shape.kv_heads, shape.group + 2, shape.head_dim)
    qkv = jax.random.normal(keys[0], vectors, jnp.dtype(shape.dtype))
    angles = jax.random.uniform(keys[1], (shape.tokens, shape.head_dim // 2), jnp.float32, 0, 100)
    room = shape.blocks * shape.block_size
    slots = jax.random.permutation(keys[2], jnp.arange(room, dtype=jnp.int32))[: shape.tokens]
    padded = jnp.arange(shape.tokens, dtype=jnp.int32) >= shape.tokens - shape.padding
    slots = jnp.where(padded, room, slots)
    return KVCacheWriteCall(qkv, jnp.cos(angles), jnp.sin(angles), _make_pool(shape), slots)


def _make_pool(shape: Shape) -> Pool:
    values = (shape.blocks, 2, shape.kv_heads, shape.block_size, shape.head_dim)
    if shape.bits is None:
        return jnp.full(values, 7, jnp.dtype(shape.dtype))
    q = jnp.full((*values[:-1], shape.head_dim * shape.bits // 8), 77, jnp.uint8)
    if shape.calibrated:
        return QuantizedPool(q, _calibrated_scales(shape), calibrated=True)
    return QuantizedPool(q, jnp.full((*values[:3], 2, shape.block_size), 7, jnp.float16))


def _calibrated_scales(shape: Shape) -> jax.Array:
    """For keys and values of each head a range of its own, about ±2, so that some elements lie outside."""
    assert shape.bits is not None
    reach = jnp.linspace(1.6, 2.4, 2 * shape.kv_heads, dtype=jnp.float32).reshape(1, 2, shape.kv_heads, 1)
    ranges = jnp.stack([2 * reach / (2**shape.bits - 1), -reach], axis=3).astype(jnp.float16)
    return jnp.broadcast_to(ranges, (shape.blocks, 2, shape.kv_heads, 2, shape.block_size))


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, floating-point operations)."""
    itemsize = jnp.dtype(shape.dtype).itemsize
    queries = shape.tokens * shape.heads * shape.head_dim
    pair = 2 * shape.tokens * shape.kv_heads
    written = pair * (shape.head_dim * (shape.bits or 8 * itemsize) // 8 + (4 if shape.bits else 0))
    read = itemsize * (queries + pair * shape.head_dim) + 4 * shape.tokens * shape.head_dim
    return read + itemsize * queries + written, 3 * (queries + pair * shape.head_dim // 2)


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.tokens, shape.kv_heads, shape.group, shape.head_dim, shape.bits, DEVICES[device].target)


def carry(call: KVCacheWriteCall, out: tuple[jax.Array, Pool]) -> KVCacheWriteCall:
    """Return the next call, over the pool that ``call`` wrote; updated in place if donated."""
    return replace(call, pool=out[1])


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return key(shape.tokens, shape.kv_heads, shape.group, shape.head_dim, shape.bits)


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.head_dim)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Elements that a program handles at most, keys and values together; it does so without a loop."""
    return 2 * tiles.tile_m * shape.head_dim
