"""Grids of integers: what they span, what they cannot miss, and the edges of float16."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.compress.grid import Grid, Rounded, fit, fit_closest, round_channels, round_to, round_to_nearest

Array = np.ndarray[Any, Any]
GRIDS = [Grid(4, 32, False), Grid(4, 32, True), Grid(3, 64, False), Grid(3, 128, True)]


def weight(seed: int, inputs: int = 128, outputs: int = 16) -> Array:
    return np.random.default_rng(seed).normal(0, 0.02, (inputs, outputs)).astype(np.float32)


def per_input(values: Any, grid: Grid) -> Array:
    return np.repeat(np.asarray(values, np.float64), grid.group_size, axis=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integers_are_nearest(grid: Grid) -> None:
    w = weight(0)
    rounded = round_to_nearest(jnp.asarray(w), grid)
    scales, zeros = per_input(rounded.scales, grid), per_input(rounded.zeros, grid)
    levels = (np.arange(2**grid.bits)[:, None, None] - zeros) * scales
    best = np.abs(levels - w).min(0)
    assert rounded.q.max() <= grid.top
    assert (np.abs(np.asarray(rounded.value()) - w) <= best + 1e-6 * scales).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_span_is_covered(grid: Grid) -> None:
    """No weight lies further from its level than half a step, plus what float16 does to 2^bits steps.

    An asymmetric zero point rounds too, and moves the whole span by up to half a step.
    """
    w = weight(1)
    rounded = round_to_nearest(jnp.asarray(w), grid)
    steps = np.abs(np.asarray(rounded.value()) - w) / per_input(rounded.scales, grid)
    assert steps.max() <= (0.5 if grid.symmetric else 1.0) + 2.0 ** (grid.bits - 11)
    assert np.median(steps) < 0.3


def test_value_follows_scattered_groups() -> None:
    rng = np.random.default_rng(2)
    q, zeros = rng.integers(0, 16, (8, 3), np.uint8), rng.integers(0, 16, (2, 3), np.uint8)
    scales, groups = rng.uniform(0.1, 1, (2, 3)).astype(np.float16), np.array([0, 1, 1, 0, 0, 1, 0, 1], np.int32)
    expected = (q.astype(np.float32) - zeros[groups]) * scales[groups].astype(np.float32)
    rounded = Rounded(*map(jnp.asarray, (q, scales, zeros, groups)))
    np.testing.assert_array_equal(rounded.value(), expected)
    again = round_to(rounded.value(), rounded.scales, rounded.zeros, Grid(4, 4, False), rounded.groups)
    np.testing.assert_array_equal(again.q, q)
    in_order = Rounded(rounded.q, rounded.scales, rounded.zeros)
    assert not np.array_equal(in_order.value(), expected)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1.0, 1e4, 1e9])
def test_constant_groups_and_float16s_ends(grid: Grid, size: float) -> None:
    """A constant group is kept where float16 can hold its scale; zeros stay exact zeros, whatever is beside them."""
    w = np.full((64, 4), size, np.float32)
    w[::2, 1] *= -1
    w[:, 2] = 0
    w[5, 3] = 0
    rounded = round_to_nearest(jnp.asarray(w), grid)
    assert np.isfinite(rounded.scales).all()
    assert (np.asarray(rounded.scales) > 0).all()
    np.testing.assert_array_equal(rounded.scales[:, 2], 1)
    value = np.asarray(rounded.value())
    np.testing.assert_array_equal(value[w == 0], 0)
    assert np.isfinite(value).all()
    if size == 1e4 and not grid.symmetric:
        np.testing.assert_allclose(value[:, [0, 2, 3]], w[:, [0, 2, 3]], rtol=2.0**-10)


def test_shrink_narrows_the_span() -> None:
    grid = Grid(4, 32, False)
    scales, zeros = fit(jnp.asarray(weight(3)), grid)
    halved, same = fit(jnp.asarray(weight(3)), grid, jnp.full(scales.shape, 0.5, jnp.float32))
    np.testing.assert_allclose(np.asarray(halved, np.float32), np.asarray(scales, np.float32) / 2, rtol=2e-3)
    assert np.abs(np.asarray(same, int) - np.asarray(zeros, int)).max() <= 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_closest_fit_loses_less(grid: Grid) -> None:
    w = np.random.default_rng(4).standard_t(3, (128, 16)).astype(np.float32)

    def loss(scales: Any, zeros: Any) -> Array:
        error = np.asarray(round_to(jnp.asarray(w), scales, zeros, grid).value(), np.float64) - w
        return np.asarray((error**2).reshape(-1, grid.group_size, 16).sum(1))

    closest, spanning = loss(*fit_closest(jnp.asarray(w), grid)), loss(*fit(jnp.asarray(w), grid))
    assert (closest <= spanning * (1 + 1e-5)).all()
    assert closest.sum() < 0.95 * spanning.sum()


def test_channels() -> None:
    w = weight(5)
    w[:, 3] = 0
    rounded = round_channels(jnp.asarray(w))
    assert rounded.q.dtype == jnp.int8
    np.testing.assert_array_equal(np.abs(np.asarray(rounded.q, int)).max(0), np.where(np.arange(16) == 3, 0, 127))
    assert (np.abs(np.asarray(rounded.value()) - w) <= 0.5001 * np.asarray(rounded.scales)).all()
    np.testing.assert_array_equal(rounded.value()[:, 3], 0)
