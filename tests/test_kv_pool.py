"""Quantised keys and values: how far from what was stored, and how they lie in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_pool import (
    Pool,
    QuantizedPool,
    block_size,
    dequantize,
    fits,
    pool_bits,
    put,
    quantize,
    stored,
)
from pallas_kernels.numerics import ACCUMULATOR, Array, unit_roundoff

HALF = unit_roundoff(jnp.float16)
SUBNORMAL = 2.0**-25
"""Largest error of rounding a number below 2^-14 to float16."""


def believable(x: Array, bits: int) -> Array:
    """Half a step; and what zero and scale lose as float16, the scale times the step that an element lies on."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    span, levels = high - low, 2**bits - 1
    step = span / levels
    zero_error = HALF * np.abs(low) + SUBNORMAL
    # Too small a scale falls short at the top by what all levels lose together; a constant 1 stands for a scale of 0.
    scale_error = np.where(step > 2 * SUBNORMAL, levels * (HALF * step + SUBNORMAL), span)
    error: Array = step / 2 * (1 + HALF) + SUBNORMAL + zero_error + scale_error + 8 * ACCUMULATOR * np.abs(x).max()
    return error


@partial(jax.jit, static_argnums=1)
def there_and_back(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values, scales, what they stand for)"""
    stored_as = quantize(x, bits)
    return *stored_as, dequantize(*stored_as, bits)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((8, 4)),
    seed=st.integers(0, 2**31 - 1),
    size=st.floats(-6, 3),
    offset=st.floats(-100, 100),
)
def test_round_trip(bits: int, seed: int, size: float, offset: float) -> None:
    x = np.random.default_rng(seed).standard_normal((5, 32)) * 10**size + offset
    *_, back = there_and_back(x.astype(np.float32), bits)
    wide = x.astype(np.float32).astype(np.float64)
    assert (np.abs(np.asarray(back, np.float64) - wide) <= believable(wide, bits)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.5, -3.25, 1e-9])
def test_constant_vectors(bits: int, value: float) -> None:
    """No division by zero: the scale is 1, every q is 0."""
    values, scales, back = there_and_back(np.full((5, 32), value, np.float32), bits)
    assert not np.asarray(values).any()
    np.testing.assert_array_equal(np.asarray(scales)[:, 0], 1)
    np.testing.assert_array_equal(np.asarray(back), np.float32(np.float16(value)))


def test_four_bits_pair_the_halves() -> None:
    """Byte i: element i below, element i + H / 2 above. With range 0 to 15 and scale 1 a q is its element."""
    q = np.array([0, 1, 2, 3, 4, 5, 6, 7, 15, 14, 13, 12, 11, 10, 9, 8], np.float32)
    values, scales, _ = there_and_back(q, 4)
    np.testing.assert_array_equal(np.asarray(scales), [1, 0])
    np.testing.assert_array_equal(np.asarray(values), [i | (15 - i) << 4 for i in range(8)])


def pool_of(bits: int | None, heads: int = 2) -> Pool:
    if bits is None:
        return jnp.zeros((3, 2, heads, 16, 32), jnp.bfloat16)
    return QuantizedPool(
        jnp.zeros((3, 2, heads, 16, 4 * bits), jnp.uint8), jnp.zeros((3, 2, heads, 2, 16), jnp.float16)
    )


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_a_pool_says_of_itself(bits: int | None) -> None:
    pool = pool_of(bits)
    assert (pool_bits(pool, 32), block_size(pool), stored(pool).shape[:4]) == (bits, 16, (3, 2, 2, 16))
    assert fits(pool, 4, 32)
    assert not fits(pool, 3, 32), "heads that KV heads do not divide"
    assert not fits(pool, 4, 128)
    assert not fits(jax.tree.map(lambda x: x[:, :1], pool), 4, 32), "keys without values"
    assert not fits(jax.tree.map(lambda x: x.astype(jnp.int32), pool), 4, 32)


def test_a_pool_whose_scales_are_another_pools_does_not_fit() -> None:
    pool, other = pool_of(8), pool_of(8, heads=1)
    assert isinstance(pool, QuantizedPool)
    assert isinstance(other, QuantizedPool)
    assert not fits(QuantizedPool(pool.values, other.scales), 4, 32)


@pytest.mark.parametrize("bits", [8, 4])
def test_calibrated_pools_clip_to_their_ranges(bits: int) -> None:
    """With scale 2 and zero −1 integers stand for −1, 1, 3 … and what lies outside for the nearest of them."""
    pool, top = pool_of(bits), 2.0 * (2**bits - 1) - 1
    assert isinstance(pool, QuantizedPool)
    scales = jnp.broadcast_to(jnp.array([2, -1], jnp.float16)[:, None], pool.scales.shape)
    given = np.resize(np.array([-1000, -1, 0.9, 3.1, top, 1e6], np.float32), (2, 2, 2, 32))
    where = jnp.array([1, 3], jnp.int32), jnp.array([5, 6], jnp.int32)  # the second is beyond the pool
    written = jax.jit(put)(QuantizedPool(pool.values, scales, calibrated=True), given, *where)
    assert isinstance(written, QuantizedPool)
    assert written.calibrated
    np.testing.assert_array_equal(written.scales, scales)
    back = dequantize(written.values, jnp.swapaxes(written.scales, -1, -2), bits)
    expected = np.full(back.shape, -1, np.float32)
    expected[1, :, :, 5] = np.resize(np.array([-1, -1, 1, 3, top, top], np.float32), (2, 2, 32))
    np.testing.assert_array_equal(back, expected)


def test_whether_a_pool_is_calibrated_survives_jit() -> None:
    pool = pool_of(8)
    assert isinstance(pool, QuantizedPool)
    for calibrated in (True, False):
        passed = jax.jit(lambda x: x)(replace(pool, calibrated=calibrated))
        assert (passed.calibrated, len(jax.tree.leaves(passed))) == (calibrated, 2)
