"""RMS norm with and without a residual, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.numerics import ACCUMULATOR, Array, unit_roundoff
from pallas_kernels.rms_norm import BACKENDS, rms_norm
from pallas_kernels.rms_norm.shapes import SHAPES, TEST_SHAPES, Shape, candidates_for, make_call, tiles_for
from pallas_kernels.rms_norm.tiles import Tiles
from tests.selection import complete, every_other

Arrays = tuple[jax.Array, ...]


def make_args(shape: Shape, seed: int = 0) -> Arrays:
    """The arrays of a call, in the order of its fields."""
    return tuple(jax.tree.leaves(make_call(shape, seed)))


def normed(shape: Shape, args: Arrays, backend: str | None, tiles: Tiles | None = None) -> list[Array]:
    """What the op gives, in float64: [normed], or [normed, sum]."""
    out = jax.jit(lambda *arrays: rms_norm(*arrays, eps=1e-5, backend=backend, tiles=tiles))(*args)
    return [np.asarray(array, np.float64) for array in (out if shape.residual else [out])]


def expected(args: Arrays) -> tuple[Array, Array]:
    """(normed, sum) in float64; the sum as its dtype holds it."""
    x, scale, *residual = args
    total = sum((np.asarray(array, np.float32) for array in residual), np.asarray(x, np.float32))
    wide = np.asarray(total.astype(x.dtype), np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64), wide


def bound(exact: Array, dtype: Any) -> Array:
    """Two roundings to ``dtype``, half the error of a sum of squares (they are positive), a few float32 operations."""
    twice = (1 + unit_roundoff(dtype)) ** 2 - 1
    allowed: Array = np.abs(exact) * (twice + 2 * ACCUMULATOR * (exact.shape[1] ** 0.5 + 6))
    return allowed


def worst(shape: Shape, args: Arrays, got: list[Array]) -> float:
    """Largest error of the normed tokens, in units of what is allowed."""
    exact, _ = expected(args)
    return float((np.abs(got[0] - exact) / np.maximum(bound(exact, shape.dtype), 1e-300)).max())


def assert_right(backend: str, shape: Shape, tiles: Tiles | None = None) -> None:
    args = make_args(shape)
    got = normed(shape, args, backend, tiles)
    assert worst(shape, args, got) < 1
    if shape.residual:
        np.testing.assert_array_equal(got[1], expected(args)[1])


@pytest.mark.parametrize("shape", every_other(TEST_SHAPES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend: str, shape: Shape) -> None:
    assert_right(backend, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*TEST_SHAPES, *(s for s in SHAPES if s.tokens <= 256)], ids=str)
def test_on_a_gpu(shape: Shape) -> None:
    assert_right("pallas_triton", shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape: Shape) -> None:
    """The tiles that an H200 takes; programs are independent: two full ones and one of a single token stand for all."""
    tiles = tiles_for(shape, "h200")
    few = replace(shape, tokens=min(shape.tokens, 2 * tiles.tile_m + 1))
    assert_right("pallas_triton", few, tiles)


@settings(max_examples=5, deadline=None)
@given(
    tokens=st.sampled_from((1, 3, 8)),
    width=st.sampled_from((32, 72, 200)),
    residual=st.booleans(),
    dtype=st.sampled_from(("bfloat16", "float32")),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(tokens: int, width: int, residual: bool, dtype: str, seed: int) -> None:
    shape = Shape("any", tokens, width, residual, dtype)
    args = make_args(shape, seed)
    for backend in complete(BACKENDS):
        assert worst(shape, args, normed(shape, args, backend)) < 1


@pytest.mark.parametrize("tiles", [Tiles(1, 2), Tiles(4, 1), Tiles(8, 4)], ids=str)
def test_tiles_change_nothing(tiles: Tiles) -> None:
    shape = TEST_SHAPES[2]
    args = make_args(shape)
    got = normed(shape, args, "pallas_triton", tiles)
    assert worst(shape, args, got) < 1
    np.testing.assert_array_equal(got[1], expected(args)[1])


def shift_scale(args: Arrays) -> Arrays:
    return (args[0], jnp.roll(args[1], 1), *args[2:])


def forget_residual(args: Arrays) -> Arrays:
    return (*args[:2], jnp.zeros_like(args[2]))


def shift_tokens(args: Arrays) -> Arrays:
    return (jnp.roll(args[0], 1, axis=0), *args[1:])


def shift_columns(args: Arrays) -> Arrays:
    return (jnp.roll(args[0], 1, axis=1), *args[1:])


@pytest.mark.parametrize("mutate", [shift_scale, forget_residual, shift_tokens, shift_columns])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_input_is_noticed(backend: str, mutate: Any) -> None:
    shape = TEST_SHAPES[2]
    args = make_args(shape)
    assert worst(shape, args, normed(shape, mutate(args), backend)) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_is_not_rounded_is_noticed(backend: str) -> None:
    """Norming x + residual in float32 gives other tokens than the unfused model has."""
    x = jnp.full((1, 64), 256.0, jnp.bfloat16)
    residual = jnp.concatenate([jnp.full((1, 32), 0.9, jnp.bfloat16), jnp.full((1, 32), -0.9, jnp.bfloat16)], axis=1)
    out, total = rms_norm(x, jnp.ones(64, jnp.bfloat16), residual, eps=1e-5, backend=backend)
    assert np.unique(np.asarray(total, np.float32)).tolist() == [255.0, 256.0]
    ratio = np.asarray(out, np.float32)[0, 0] / np.asarray(out, np.float32)[0, -1]
    assert ratio == pytest.approx(256 / 255, rel=2 * float(jnp.finfo(jnp.bfloat16).eps))


def test_zeros_stay_zeros() -> None:
    for backend in complete(BACKENDS):
        out = rms_norm(jnp.zeros((2, 48)), jnp.ones(48), eps=1e-5, backend=backend)
        assert not np.asarray(out).any()


def test_every_real_shape_has_candidates() -> None:
    for shape in SHAPES:
        threads = [tiles.num_warps * 32 for tiles in candidates_for(shape)]
        assert threads
        assert max(threads) <= 1024


def test_a_token_too_wide_is_refused() -> None:
    with pytest.raises(NoBackendError, match="at most 32768 elements, have D=32769"):
        rms_norm(jnp.zeros((1, 32769)), jnp.zeros(32769), eps=1e-5, backend="pallas_triton")


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((2, 8), (7,)), "does not fit scale"),
        (((2, 2, 8), (8,)), "does not fit scale"),
        (((2, 8), (8,), (1, 8)), "residual .* does not fit x"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rms_norm(*map(jnp.zeros, shapes), eps=1e-5)


def test_a_scale_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="scale dtype=float32 must be that of x, bfloat16; cast it"):
        rms_norm(jnp.zeros((1, 8), jnp.bfloat16), jnp.zeros(8), eps=1e-5)


@pytest.mark.parametrize("added", [False, True])
def test_the_kernel_has_the_derivative_of_the_reference(added: bool) -> None:
    shape = Shape("small", 3, 64, residual=added, dtype="float32")
    args = make_args(shape)

    def loss(backend: str, *arrays: jax.Array) -> jax.Array:
        out = rms_norm(*arrays, eps=1e-5, backend=backend)
        return sum((jnp.sin(part).sum() for part in jax.tree.leaves(out)), start=jnp.float32(0))

    kernel, plain = (
        jax.grad(partial(loss, name), argnums=range(len(args)))(*args) for name in ("pallas_triton", "reference")
    )
    for got, wanted in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
