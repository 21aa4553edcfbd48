"""Rotary positions and the write into the KV cache, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.models import rope
from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.kv_cache_write import BACKENDS, KVCacheWriteCall, kv_cache_write
from pallas_kernels.kv_cache_write.shapes import (
    SHAPES,
    TEST_SHAPES,
    Shape,
    candidates_for,
    cost,
    elements_per_trip,
    key_for,
    make_call,
    tiles_for,
)
from pallas_kernels.kv_cache_write.tiles import Tiles
from pallas_kernels.kv_pool import QuantizedPool
from pallas_kernels.numerics import ACCUMULATOR, Array, unit_roundoff
from tests.paged_attention_truth import FAST_COMPILE, elements
from tests.selection import complete, every_other

Args = tuple[Any, ...]
BY_NAME = {shape.model: shape for shape in TEST_SHAPES}


@cache
def made(shape: Shape) -> Args:
    call = jax.jit(lambda: make_call(shape), compiler_options=FAST_COMPILE)()
    return operands(call)


def operands(call: KVCacheWriteCall) -> Args:
    return call.qkv, call.cos, call.sin, call.pool, call.slots


@partial(jax.jit, static_argnames=("backend", "tiles"), compiler_options=FAST_COMPILE)
def write(*args: Any, **options: Any) -> Any:
    return kv_cache_write(*args, **options)


def rotated(x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """``x`` [T, ..., H] turned, in float64, and the size of what is added up."""
    low, high = np.split(x, 2, axis=-1)
    cos, sin = (table.reshape(len(x), *[1] * (x.ndim - 2), -1) for table in (cos, sin))
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned, np.concatenate([np.abs(low * cos) + np.abs(high * sin), np.abs(high * cos) + np.abs(low * sin)], -1)


def worst(args: Args, got: Any) -> float:
    """Largest error of queries and of what the slots now hold, in units of what is believable."""
    qkv, cos, sin, pool, slots = args
    wide, tables = np.asarray(qkv, np.float64), [np.asarray(x, np.float64) for x in (cos, sin)]
    roundoff = unit_roundoff(qkv.dtype)
    queries, size = rotated(wide[:, :, :-2], *tables)
    bound = roundoff * np.abs(queries) + 4 * ACCUMULATOR * size
    errors = np.abs(np.asarray(got[0], np.float64).reshape(queries.shape) - queries) / bound

    key, size = rotated(wide[:, :, -2], *tables)
    both = np.stack([key, wide[:, :, -1]], axis=1)
    bound = np.stack([roundoff * np.abs(key) + 4 * ACCUMULATOR * size, np.zeros_like(size)], axis=1)
    block_size = args[3].scales.shape[-1] if isinstance(pool, QuantizedPool) else pool.shape[3]
    slots = np.asarray(slots)
    inside = slots < len(jax.tree.leaves(pool)[0]) * block_size
    block, offset = slots[inside] // block_size, slots[inside] % block_size
    held = elements(got[1], wide.shape[-1])[0][block, :, :, offset]
    wanted = both[inside]
    if isinstance(pool, QuantizedPool):
        # Half a step of what is stored, and its last bit.
        levels = 2 ** pool.bits(wide.shape[-1]) - 1
        ranges = pool.scales if pool.calibrated else got[1].scales
        step, zero = (np.asarray(ranges, np.float64)[block, :, :, i, offset][..., None] for i in (0, 1))
        half = unit_roundoff(jnp.float16)
        bound[inside] += step / 2 + 4 * ACCUMULATOR * (np.abs(zero) + levels * step)
        if pool.calibrated:
            wanted = np.clip(wanted, zero, zero + levels * step)
        else:  # The last bit of zero; a float16 scale, on the highest level.
            bound[inside] += levels * step * half + np.abs(zero) * half
            bound *= 1 + half
    stored = np.abs(held - wanted) / np.maximum(bound[inside], 1e-300)
    return float(max(errors.max(), stored.max(initial=0)))


def untouched(args: Args, got: Any) -> bool:
    """Whether every other slot holds what it held."""
    slots, same = np.asarray(args[4]), True
    for before, after in zip(jax.tree.leaves(args[3]), jax.tree.leaves(got[1]), strict=True):
        is_scales = before.dtype == jnp.float16 and isinstance(args[3], QuantizedPool)
        old, new = (np.moveaxis(np.asarray(x), -1 if is_scales else 3, 1) for x in (before, after))
        old, new = (x.reshape(x.shape[0] * x.shape[1], -1) for x in (old, new))
        others = np.setdiff1d(np.arange(len(old)), slots)
        same = same and np.array_equal(old[others], new[others])
    return same


def assert_right(backend: str, shape: Shape, tiles: Tiles | None = None) -> None:
    args = made(shape)
    got = write(*args, backend=backend, tiles=tiles)
    assert got[0].dtype == args[0].dtype
    assert worst(args, got) < 1
    assert untouched(args, got)


@pytest.mark.parametrize("shape", every_other(TEST_SHAPES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend: str, shape: Shape) -> None:
    assert_right(backend, shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["8 bits, calibrated", "4 bits, calibrated"])
def test_calibrated_ranges_stay(name: str, backend: str) -> None:
    """They are the same after a write, and some elements were outside and are clipped."""
    args = made(BY_NAME[name])
    _, pool = write(*args, backend=backend)
    assert pool.calibrated
    np.testing.assert_array_equal(pool.scales, args[3].scales)
    online = replace(args[3], calibrated=False)
    assert worst(args, write(*args[:3], online, args[4], backend=backend)) > 2, "each vector's own range is noticed"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*TEST_SHAPES, *SHAPES], ids=str)
def test_on_a_gpu(shape: Shape) -> None:
    assert_right("pallas_triton", shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape: Shape) -> None:
    """The tiles that an H200 takes; programs are independent: two full ones and one of a single token stand for all."""
    tiles = tiles_for(shape, "h200")
    few = replace(shape, tokens=min(shape.tokens, 2 * tiles.tile_m + 1))
    assert_right("pallas_triton", few, tiles)


@pytest.mark.parametrize("tiles", [Tiles(4, 1), Tiles(32, 4)], ids=str)
def test_tiles_change_nothing(tiles: Tiles) -> None:
    """Tokens that fill no tile; and a tile that no tokens fill."""
    args = made(BY_NAME["padding"])
    one = write(*args, backend="pallas_triton")
    other = write(*args, backend="pallas_triton", tiles=tiles)
    jax.tree.map(np.testing.assert_array_equal, other, one)


@pytest.mark.parametrize("name", ["8 bits", "4 bits"])
def test_constant_vectors(name: str) -> None:
    qkv, cos, sin, pool, slots = made(BY_NAME[name])
    args = (jnp.ones_like(qkv), jnp.ones_like(cos), jnp.zeros_like(sin), pool, slots)
    for backend in complete(BACKENDS):
        assert worst(args, write(*args, backend=backend)) < 1


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(("padding", "8 bits", "4 bits", "8 bits, calibrated")),
    seed=st.integers(0, 2**31 - 1),
    beyond=st.integers(0, 9),
)
def test_any_slots(name: str, seed: int, beyond: int) -> None:
    qkv, cos, sin, pool, slots = made(BY_NAME[name])
    random = np.random.default_rng(seed)
    room = BY_NAME[name].blocks * BY_NAME[name].block_size
    drawn = random.permutation(room)[: len(slots)].astype(np.int32)
    drawn[:beyond] = room + random.integers(0, 1000, beyond)
    args = (qkv, cos, sin, pool, jnp.asarray(drawn))
    got = write(*args, backend="pallas_triton")
    assert worst(args, got) < 1
    assert untouched(args, got)


def swap_cos_and_sin(args: Args) -> Args:
    return (args[0], args[2], args[1], *args[3:])


def turn_backwards(args: Args) -> Args:
    return (*args[:2], -args[2], *args[3:])


def swap_key_and_value(args: Args) -> Args:
    return (args[0].at[:, :, -2:].set(args[0][:, :, :-3:-1]), *args[1:])


def shift_slots(args: Args) -> Args:
    return (*args[:4], args[4] + 1)


def swap_neighbours(args: Args) -> Args:
    return (args[0].at[..., :2].set(args[0][..., 1::-1]), *args[1:])


@pytest.mark.parametrize("name", ["padding", "8 bits", "4 bits", "8 bits, calibrated"])
@pytest.mark.parametrize("mutate", [swap_cos_and_sin, turn_backwards, swap_key_and_value, shift_slots, swap_neighbours])
def test_a_wrong_input_is_noticed(mutate: Any, name: str) -> None:
    args = made(BY_NAME[name])
    assert worst(args, write(*mutate(args), backend="pallas_triton")) > 2


def test_a_write_elsewhere_is_noticed() -> None:
    args = made(BY_NAME["8 bits"])
    assert not untouched(args, write(*shift_slots(args), backend="pallas_triton"))


def test_it_rotates_as_the_model_does() -> None:
    qkv, cos, sin, pool, slots = made(BY_NAME["float32"])
    q, _ = write(qkv, cos, sin, pool, slots, backend="reference")
    model = jax.jit(rope.rotated)(qkv[:, :, :-2].reshape(q.shape), rope.Rotary(cos, sin))
    np.testing.assert_allclose(q, model, rtol=0, atol=8 * unit_roundoff(jnp.float32))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (21, 2, 2, 80), "must be"),
        (0, (21, 2, 5, 82), "pool"),
        (1, (21, 80), "cos"),
        (2, (20, 40), "sin"),
        (3, (3, 2, 1, 16, 80), "pool"),
        (4, (20,), "slots"),
    ],
)
def test_shapes_that_do_not_fit(index: int, shape: tuple[int, ...], message: str) -> None:
    args = made(BY_NAME["padding"])
    changed = [jnp.zeros(shape, array.dtype) if i == index else array for i, array in enumerate(args)]
    with pytest.raises(ValueError, match=message):
        kv_cache_write(*changed)


def test_angles_in_half_precision_are_refused() -> None:
    qkv, cos, sin, pool, slots = made(BY_NAME["padding"])
    with pytest.raises(ValueError, match="must be float32"):
        kv_cache_write(qkv, cos.astype(jnp.float16), sin, pool, slots)


def test_refusals() -> None:
    args = operands(jax.eval_shape(lambda: make_call(Shape("head dim", 3, 2, 1, 24))))
    with pytest.raises(NoBackendError, match="pallas_triton needs a head_dim that is a multiple of 16, have 24"):
        kv_cache_write(*args, backend="pallas_triton")
    with pytest.raises(NoBackendError, match="reference has no tiles"):
        kv_cache_write(*args, backend="reference", tiles=Tiles(1, 1))


def test_every_shape_has_tiles() -> None:
    for shape in SHAPES:
        tiles = tiles_for(shape, "h200")
        assert elements_per_trip(shape, tiles) == 2 * tiles.tile_m * 128
        assert len(list(candidates_for(shape))) > 3
        assert min(cost(shape)) > 0
    assert len({key_for(shape) for shape in SHAPES}) == len(SHAPES)
