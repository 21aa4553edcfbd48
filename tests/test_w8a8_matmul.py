"""int8 weights times tokens quantised to int8, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.numerics import ACCUMULATOR, Array, sum_bound, unit_roundoff
from pallas_kernels.w8a8_matmul import BACKENDS, w8a8_matmul
from pallas_kernels.w8a8_matmul.shapes import SHAPES, TEST_SHAPES, Shape, candidates_for, make_call, tiles_for
from pallas_kernels.w8a8_matmul.tiles import Tiles, heuristic
from tests.selection import complete, every_other

Arrays = tuple[jax.Array, ...]


def make_args(shape: Shape, seed: int = 0) -> Arrays:
    """The arrays of a call, in the order of its fields."""
    return tuple(jax.tree.leaves(make_call(shape, seed)))


def multiplied(args: Arrays, backend: str | None, tiles: Tiles | None = None) -> Array:
    """What the op gives, in float64."""
    out = jax.jit(lambda *arrays: w8a8_matmul(*arrays, backend=backend, tiles=tiles))(*args)
    assert out.dtype == args[0].dtype
    return np.asarray(out, np.float64)


def expected(args: Arrays, rounded: Any = np.rint) -> tuple[Array, Array]:
    """(the product in float64, the largest believable error).

    Sums of integers are exact, so few roundings are left: those of the scaling and the bias, and a token's value that
    lies halfway between two steps, but for the error of computing it, may have gone to either.
    """
    x, weight, scales, *bias = (np.asarray(array, np.float64) for array in args)
    peaks = np.abs(x).max(axis=1, keepdims=True)
    values = 127 * x / np.where(peaks > 0, peaks, 1)
    worth = peaks / 127 * scales
    product = rounded(values) @ weight.T * worth
    shift = bias[0] if bias else np.zeros(weight.shape[0])
    undecided = np.abs(np.abs(values % 1) - 0.5) < 127 * 4 * ACCUMULATOR
    exact = product + shift
    believable = sum_bound(exact, np.abs(product) + np.abs(shift), 4, args[0].dtype)
    turned = undecided.astype(np.float64) @ np.abs(weight.T) * worth
    return exact, believable + turned * (1 + unit_roundoff(args[0].dtype))


def worst(args: Arrays, got: Array, rounded: Any = np.rint) -> float:
    """Largest error, in units of what is believable."""
    exact, bound = expected(args, rounded)
    return float((np.abs(got - exact) / np.maximum(bound, 1e-300)).max())


@pytest.mark.parametrize("shape", every_other(TEST_SHAPES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend: str, shape: Shape) -> None:
    args = make_args(shape)
    assert worst(args, multiplied(args, backend)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TEST_SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["pallas_triton", "xla"])
def test_on_a_gpu(backend: str, shape: Shape) -> None:
    test_backend(backend, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape: Shape) -> None:
    """An H200's tiles and splits, and all of K; columns and tokens are independent, so a tile and a half will do."""
    tiles = tiles_for(shape, "h200")
    args = make_args(replace(shape, m=min(shape.m, 192), n=tiles.tile_n * 3 // 2))
    assert worst(args, multiplied(args, "pallas_triton", tiles)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes_on_a_gpu(shape: Shape) -> None:
    test_real_shapes(shape)


@settings(max_examples=5, deadline=None)
@given(
    m=st.sampled_from((1, 17, 65)),
    k=st.sampled_from((32, 96, 256)),
    n=st.sampled_from((8, 40, 64)),
    bias=st.booleans(),
    dtype=st.sampled_from(("bfloat16", "float32")),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(m: int, k: int, n: int, bias: bool, dtype: str, seed: int) -> None:
    args = make_args(Shape("any", m, k, n, bias, dtype), seed)
    for backend in complete(BACKENDS):
        assert worst(args, multiplied(args, backend)) < 1


@pytest.mark.parametrize(
    "tiles", [Tiles(16, 32, 32, 1, 4, 2), Tiles(16, 64, 64, 8, 4, 4), Tiles(32, 128, 128, 2, 4, 4)], ids=str
)
def test_tiles_change_nothing(tiles: Tiles) -> None:
    args = make_args(Shape("split", 18, 512, 130, bias=True))
    np.testing.assert_array_equal(multiplied(args, "pallas_triton", tiles), multiplied(args, "pallas_triton"))


MUTATED = Shape("mutated", 17, 256, 64, bias=True)


def shift(index: int, axis: int) -> Any:
    """Argument ``index`` off by one along ``axis``."""

    def mutate(args: Arrays) -> Arrays:
        return tuple(jnp.roll(array, 1, axis) if i == index else array for i, array in enumerate(args))

    mutate.__name__ = f"shift_{('x', 'weight', 'scales', 'bias')[index]}_{axis}"
    return mutate


def forget_bias(args: Arrays) -> Arrays:
    return args[:3]


def forget_last_column_of_k(args: Arrays) -> Arrays:
    return (args[0], args[1].at[:, -1].set(0), *args[2:])


MUTATIONS = [shift(0, 0), shift(0, 1), shift(1, 0), shift(1, 1), shift(2, 0), shift(3, 0)]


@pytest.mark.parametrize("mutate", [*MUTATIONS, forget_bias, forget_last_column_of_k], ids=lambda m: m.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_input_is_noticed(backend: str, mutate: Any) -> None:
    args = make_args(MUTATED)
    assert worst(args, multiplied(mutate(args), backend)) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_rounding_is_noticed(backend: str) -> None:
    args = make_args(replace(MUTATED, dtype="float32"))
    assert worst(args, multiplied(args, backend), np.trunc) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_go_to_even(backend: str) -> None:
    """With a step of 1 a token is its own quantisation."""
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0, *[0.0] * 24]])
    out = w8a8_matmul(x, jnp.eye(32, dtype=jnp.int8), jnp.ones(32), backend=backend)
    assert np.asarray(out)[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-31])
def test_tokens_too_small_for_a_step(backend: str, value: float) -> None:
    """The smallest step is 1e-30 / 127; nothing is lost that a float16 or bfloat16 result near 1 could show."""
    x = jnp.full((2, 32), value).at[1].set(3.0)
    out = np.asarray(w8a8_matmul(x, jnp.ones((16, 32), jnp.int8), jnp.ones(16), backend=backend))
    np.testing.assert_allclose(out[0], 32 * value, rtol=0, atol=32 * 1e-30 / 254)
    np.testing.assert_allclose(out[1], 96.0, rtol=1e-6)


def test_splits_leave_work_for_each_program() -> None:
    assert heuristic(1, 4096, 4096, 132).splits == 4
    assert heuristic(1, 4096, 28672, 132).splits == 1
    assert heuristic(64, 4096, 4096, 132).splits == 2
    assert heuristic(1, 96, 64, 132).tile_k == 32
    assert heuristic(4096, 4096, 4096, 132) == Tiles(128, 128, 128, 1, 8, 3)
    assert heuristic(128, 4096, 4096, 132).tile_n == 64


def test_every_real_shape_has_candidates() -> None:
    for shape in SHAPES:
        tiles = list(candidates_for(shape))
        assert len(tiles) == len(set(tiles)) > 4
        assert all(shape.k % (t.tile_k * t.splits) == 0 for t in tiles)


@pytest.mark.parametrize(
    ("k", "tiles", "told"),
    [
        (40, None, "needs K up to 32768 in steps of 32, have K=40"),
        (32800, None, "needs K up to 32768"),
        (96, Tiles(16, 16, 64, 1, 4, 2), "needs K in 1 splits of 64"),
    ],
)
def test_what_the_kernel_refuses(k: int, tiles: Tiles | None, told: str) -> None:
    with pytest.raises(NoBackendError, match=told):
        w8a8_matmul(
            jnp.zeros((1, k)), jnp.zeros((16, k), jnp.int8), jnp.zeros(16), backend="pallas_triton", tiles=tiles
        )


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((2, 32), (32, 16), (32,)), "does not fit weight"),
        (((2, 32), (16, 32), (32,)), "scales .* does not fit weight"),
        (((2, 32), (16, 32), (16,), (1, 16)), "bias .* does not fit weight"),
        (((2, 133153), (1, 133153), (1,)), "K=133153 could overflow"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], told: str) -> None:
    x, weight, *rest = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=told):
        w8a8_matmul(x, weight.astype(jnp.int8), *rest)


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must be a float, int8 and float32; cast them"):
        w8a8_matmul(jnp.zeros((1, 32)), jnp.zeros((16, 32), jnp.uint8), jnp.zeros(16))
