"""The op as one kernel, for GPUs from Ampere on. The pool is updated in place.

A program has one vector of each of its tokens: a query, or a key together with its value. A vector is handled in pieces
that rotary embedding turns into one another elementwise: two halves, and for a quantised pool the even and the odd
elements of each, which share the pool's 16-bit words (``pallas_kernels.paged_attention.words``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.kv_cache_write.call import KVCacheWriteCall
from pallas_kernels.kv_cache_write.tiles import Tiles, choose
from pallas_kernels.kv_pool import Pool, QuantizedPool, block_size, integers, pool_bits, range_of
from pallas_kernels.paged_attention.words import as_words, from_words
from pallas_kernels.target import Target, current_target

_KEYS, _VALUES = 0, 1


def check_device(target: Target) -> None:
    """Refuse what is no GPU of compute capability 8.0 or newer."""
    need_gpu(target)


def check(call: KVCacheWriteCall) -> None:
    """Refuse a head_dim that is not a multiple of 16."""
    size = call.qkv.shape[-1]
    if size % 16:
        raise RefusalError(f"needs a head_dim that is a multiple of 16, have {size}")


def run(call: KVCacheWriteCall, tiles: Tiles | None = None) -> tuple[jax.Array, Pool]:
    """See ``pallas_kernels.kv_cache_write.kv_cache_write``."""
    qkv, pool, target = call.qkv, call.pool, current_target()
    tokens, kv_heads, vectors, size = qkv.shape
    bits, words = pool_bits(pool, size), as_words(pool)
    chosen = choose(tokens, kv_heads, vectors - 2, size, bits, target, tiles)
    calibrated = isinstance(pool, QuantizedPool) and pool.calibrated
    kernel = _Kernel(bits, size, block_size(pool), chosen.tile_m, calibrated=calibrated)
    changed = words[:1] if calibrated else words
    outputs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in changed]
    q, *written = pl.pallas_call(
        kernel.run,
        grid=(pl.cdiv(tokens, chosen.tile_m), kv_heads, vectors - 1),
        out_shape=[jax.ShapeDtypeStruct((tokens, kv_heads, vectors - 2, size), qkv.dtype), *outputs],
        input_output_aliases={4 + index: 1 + index for index in range(len(changed))},
        compiler_params=plt.CompilerParams(num_warps=chosen.num_warps, num_stages=1),
        interpret=target.interpret,
        name="kv_cache_write",
    )(qkv, call.cos, call.sin, call.slots, *words)
    updated = from_words((*written, *words[len(written) :]))
    if isinstance(updated, QuantizedPool):
        updated = replace(updated, calibrated=calibrated)
    return q.reshape(tokens, -1, size), updated


_Pieces = list[tuple[jax.Array, jax.Array]]
"""For each remainder, the elements of the first and of the second half that have it: float32 [tile_m, W] each."""


@dataclass(frozen=True)
class _Kernel:
    """What is known of a call when it is compiled: ``bits`` of a quantised pool, H, S, tokens of a program.

    Scales of a ``calibrated`` pool are read; else they are written.
    """

    bits: int | None
    head_dim: int
    block_size: int
    tile_m: int
    calibrated: bool

    def run(self, qkv_ref: Any, cos_ref: Any, sin_ref: Any, slots_ref: Any, *refs: Any) -> None:
        """The body. The pool's references follow as inputs, and behind q those that change as outputs."""
        inputs = 1 if self.bits is None else 2
        q_ref, *pool = refs[inputs:]
        pool += refs[len(pool) : inputs]
        kv_head, vector = pl.program_id(1), pl.program_id(2)
        key = qkv_ref.shape[2] - 2
        tokens = pl.program_id(0) * self.tile_m + jnp.arange(self.tile_m, dtype=jnp.int32)
        real = tokens < qkv_ref.shape[0]

        rotated: _Pieces = []
        for remainder, (low, high) in enumerate(self._load(qkv_ref, tokens, kv_head, vector, real)):
            lanes, mask = self._lanes(real)
            at = (tokens[:, None], (self._step * lanes + remainder)[None, :])
            cos, sin = (plt.load(ref.at[at], mask=mask, other=jnp.float32(0)) for ref in (cos_ref, sin_ref))
            turned = low * cos - high * sin, high * cos + low * sin
            first, second = (x.astype(qkv_ref.dtype).astype(jnp.float32) for x in turned)
            rotated.append((first, second))

        @pl.when(vector < key)
        def _query() -> None:
            at = (tokens[:, None], kv_head, vector)
            self._store_elements(q_ref, at, rotated, real)

        @pl.when(vector == key)
        def _key_and_value() -> None:
            room = pool[0].shape[0] * self.block_size
            slots = plt.load(slots_ref.at[tokens], mask=real, other=jnp.int32(room))
            inside = slots < room
            value = self._load(qkv_ref, tokens, kv_head, vector + 1, real)
            for half, pieces in ((_KEYS, rotated), (_VALUES, value)):
                self._put(pool, half, kv_head, slots, pieces, inside)

    @property
    def _step(self) -> int:
        """Elements of a half that share a word."""
        return 1 if self.bits is None else 2

    def _lanes(self, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Indices int32 [W] of a piece's elements, and which are there for which tokens, [tile_m, W]."""
        count = self.head_dim // 2 // self._step
        lanes = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
        return lanes, real[:, None] & (lanes < count)[None, :]

    def _load(self, qkv_ref: Any, tokens: jax.Array, kv_head: jax.Array, vector: jax.Array, real: jax.Array) -> _Pieces:
        lanes, mask = self._lanes(real)

        def half(remainder: int, start: int) -> jax.Array:
            at = qkv_ref.at[tokens[:, None], kv_head, vector, (self._step * lanes + remainder + start)[None, :]]
            return plt.load(at, mask=mask, other=jnp.zeros((), qkv_ref.dtype)).astype(jnp.float32)

        return [(half(remainder, 0), half(remainder, self.head_dim // 2)) for remainder in range(self._step)]

    def _store_elements(self, ref: Any, at: tuple[Any, ...], pieces: _Pieces, real: jax.Array) -> None:
        lanes, mask = self._lanes(real)
        for remainder, halves in enumerate(pieces):
            for start, x in zip((0, self.head_dim // 2), halves, strict=True):
                elements = (self._step * lanes + remainder + start)[None, :]
                plt.store(ref.at[(*at, elements)], x.astype(ref.dtype), mask=mask)

    def _put(
        self, pool: list[Any], half: int, kv_head: jax.Array, slots: jax.Array, pieces: _Pieces, inside: jax.Array
    ) -> None:
        """Keys or values into their slots, where ``inside`` [tile_m]."""
        block, offset = lax.div(slots, self.block_size), lax.rem(slots, self.block_size)
        at = (block[:, None], jnp.int32(half), kv_head, offset[:, None])
        if self.bits is None:
            self._store_elements(pool[0], at, pieces, inside)
            return
        lanes, there = self._lanes(inside)
        places = [pool[1].at[block, jnp.int32(half), kv_head, jnp.int32(which), offset] for which in range(2)]
        if self.calibrated:
            scale, zero = (plt.load(place, mask=inside, other=jnp.float16(1)) for place in places)
        else:
            scale, zero = self._range(pieces, there, self.bits)
            for place, x in zip(places, (scale, zero), strict=True):
                plt.store(place, x, mask=inside)
        (a, b), (c, d) = ([integers(x, scale[:, None], zero[:, None], self.bits) for x in halves] for halves in pieces)
        if self.bits == 4:
            plt.store(pool[0].at[(*at, lanes[None, :])], _word(a | (b << 4), c | (d << 4)), mask=there)
            return
        for start, word in ((0, _word(a, c)), (self.head_dim // 4, _word(b, d))):
            plt.store(pool[0].at[(*at, (lanes + start)[None, :])], word, mask=there)

    def _range(self, pieces: _Pieces, there: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
        """Scale and zero, float16 [tile_m], of vectors whose elements are ``there``."""
        flat = [x for halves in pieces for x in halves]
        low = _over(jnp.minimum, [jnp.where(there, x, jnp.inf).min(axis=1) for x in flat])
        high = _over(jnp.maximum, [jnp.where(there, x, -jnp.inf).max(axis=1) for x in flat])
        return range_of(low, high, bits)


def _over(fold: Any, arrays: list[jax.Array]) -> jax.Array:
    first, *rest = arrays
    for array in rest:
        first = fold(first, array)
    return first


def _word(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two bytes as the 16-bit word that they are in memory."""
    return (low | (high << 8)).astype(jnp.uint16)
