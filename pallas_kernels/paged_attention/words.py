"""Stored keys and values as kernels read them: in 16-bit words, taken apart into operands of a dot.

A word of a quantised pool is two neighbouring bytes. Read so, tiles pass through shared memory and ``ldmatrix`` like
any 16-bit matrix, and one instruction unpacks two words. Floats are written rather than converted: an integer in the
low bits of a float16's mantissa, under the right exponent, *is* the float ``base + integer``. The bases come off
sums, never off elements. A pool beyond 2^31 bytes needs 16-bit words besides: the 32-bit offsets of Pallas reach that
many elements, and it changes to 64 bits at 2^32 bytes only.

A vector of H elements becomes ``parts`` shorter ones. For 8-bit elements they are the even and the odd ones; for 4-bit
elements each of those is cut in two halves, the two that ``QuantizedPool`` packs into a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.paged_attention.instructions import assembly
from pallas_kernels.target import current_target

_HIGH_BYTES = "prmt.b32 $0, $1, 0x64646464, 0x4341;"
_PICK = "lop3.b32 $0, $1, {mask}, {exponent}, 0xea;"
_PICK_HIGH = "{{ .reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, {mask}, {exponent}, 0xea; }}"


@dataclass(frozen=True)
class _Field:
    """An integer of ``bits`` bits at bit ``shift`` of a word, to be read as ``base`` + integer."""

    shift: int
    bits: int

    @property
    def base(self) -> int:
        """The float16 whose mantissa counts ones at the lowest bit of the field, in its byte."""
        return 1024 >> (self.shift % 8)

    def read(self, words: jax.Array) -> jax.Array:
        """float16 ``base`` + integer, for uint16 ``words``."""
        exponent = int(np.float16(self.base).view(np.uint16))
        mask = ((1 << self.bits) - 1) << (self.shift % 8)
        if current_target().interpret:
            integer = lax.shift_right_logical(words, jnp.uint16(self.shift - self.shift % 8)) & jnp.uint16(mask)
            return lax.bitcast_convert_type(integer | jnp.uint16(exponent), jnp.float16)
        if self == _Field(8, 8):
            code = _HIGH_BYTES
        else:
            pick = _PICK_HIGH if self.shift >= 8 else _PICK
            code = pick.format(mask=hex(mask * 0x10001), exponent=hex(exponent * 0x10001))
        return assembly(code, "=r,r", jnp.float16, words, pack=2)


_FIELDS = {8: (_Field(0, 8), _Field(8, 8)), 4: (_Field(0, 4), _Field(4, 4), _Field(8, 4), _Field(12, 4))}


@dataclass(frozen=True)
class Words:
    """The words of a vector of H = ``head_dim`` elements of ``bits`` bits; ``None`` for floats, each of them a word.

    ``parts`` are numbered as their fields lie in a word, from the lowest bit.
    """

    bits: int | None
    head_dim: int

    @property
    def parts(self) -> int:
        """Elements in a word."""
        return 1 if self.bits is None else 16 // self.bits

    @property
    def count(self) -> int:
        """Words of a vector."""
        return self.head_dim // self.parts

    @property
    def padded(self) -> int:
        """``count`` as the power of two that tiles need; words beyond ``count`` are not there.

        At least 32: four warps that share a narrower product each compute all of it.
        """
        return max(32, int(pl.next_power_of_2(self.count)))

    @property
    def bases(self) -> tuple[int, ...]:
        """What each part of ``unpack`` has been raised by."""
        return (0,) if self.bits is None else tuple(field.base for field in _FIELDS[self.bits])

    def elements(self, part: int) -> jax.Array:
        """Which elements of the vector a part holds, int32 [padded]."""
        word = jnp.arange(self.padded, dtype=jnp.int32)
        if self.bits is None:
            return word
        if self.bits == 8:
            return 2 * word + part
        return 2 * word + part // 2 + (part % 2) * (self.head_dim // 2)

    def unpack(self, words: jax.Array) -> tuple[jax.Array, ...]:
        """The parts of ``words`` [..., padded]: floats as they are, else float16 ``base`` + integer."""
        return (words,) if self.bits is None else tuple(field.read(words) for field in _FIELDS[self.bits])


def as_words(pool: Pool) -> tuple[jax.Array, ...]:
    """The pool's arrays, words for bytes: (pool,), or (uint16 [P, 2, K, S, H · bits / 16], scales). Copies nothing."""
    if not isinstance(pool, QuantizedPool):
        return (pool,)
    values = pool.values
    return lax.bitcast_convert_type(values.reshape(*values.shape[:-1], -1, 2), jnp.uint16), pool.scales


def from_words(words: tuple[jax.Array, ...]) -> Pool:
    """The inverse of ``as_words``."""
    if len(words) == 1:
        return words[0]
    values = lax.bitcast_convert_type(words[0], jnp.uint8)
    return QuantizedPool(values.reshape(*values.shape[:-2], -1), words[1])
