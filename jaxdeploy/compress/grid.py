"""Rounding a weight to integers that share scales, and what the integers stand for.

Weights are [K, N], K inputs and N outputs, float32. Letters: G groups of inputs, g = K / G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_SMALLEST_SCALE = 2.0**-20
_LARGEST_SCALE = 65504.0
_INT8_TOP = 127.0
_SHRINKS = tuple(1 - step / 40 for step in range(21))


@dataclass(frozen=True)
class Grid:
    """The integers of a weight: 0 … 2^bits − 1, one scale and zero point for ``group_size`` inputs of an output.

    ``group_size`` divides K, and is K where an output has one scale. ``symmetric``: the zero point is in the middle.
    Zero points are at least ``least_zero``: 1 for layouts that store them less 1, and that readers would misread 0 of.
    """

    bits: int
    group_size: int
    symmetric: bool
    least_zero: int = 0

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight in few bits: ``(q - zero) · scale``.

    ``q`` uint8 [K, N]; ``scales`` float16 and ``zeros`` uint8 [G, N]; ``groups`` int32 [K] is the group of each input,
    ``None`` where input k is in group k // (K / G).
    """

    q: jax.Array
    scales: jax.Array
    zeros: jax.Array
    groups: jax.Array | None = None

    @jax.jit
    def value(self) -> jax.Array:
        """The weight that this stands for, float32 [K, N]."""
        inputs = self.q.shape[0]
        scales, zeros = (per_input(x, inputs, self.groups) for x in (self.scales, self.zeros))
        return (self.q.astype(jnp.float32) - zeros) * scales


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ChannelRounded:
    """A weight in int8: ``q · scale``. ``q`` int8 [K, N], ``scales`` float32 [N]."""

    q: jax.Array
    scales: jax.Array

    @jax.jit
    def value(self) -> jax.Array:
        """The weight that this stands for, float32 [K, N]."""
        return self.q.astype(jnp.float32) * self.scales


@partial(jax.jit, static_argnames="grid")
def fit(weight: jax.Array, grid: Grid, shrink: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Scales float16 and zero points uint8, [G, N] each, that span ``weight`` [K, N] and zero.

    The span of a group is multiplied by ``shrink``, [G, N] or one for all (default 1); what then lies outside is
    clipped. A symmetric grid spans ±max|w| with its 2^bits − 1 steps, so that the largest weight of one sign is clipped
    by half a step: on normal weights that costs less than the wider steps of max|w| / (2^(bits−1) − 1). A group of
    zeros has scale 1. Zero is always exact, and scales lie in 2^-20 … 65504.
    """
    grouped = weight.reshape(-1, grid.group_size, weight.shape[1])
    ratio = jnp.float32(1) if shrink is None else shrink
    low = jnp.minimum(grouped.min(1), 0) * ratio
    high = jnp.maximum(grouped.max(1), 0) * ratio
    if grid.symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    span = high - low
    scales = jnp.clip(span / grid.top, _SMALLEST_SCALE, _LARGEST_SCALE)
    scales = jnp.where(span > 0, scales, 1).astype(jnp.float16)
    if grid.symmetric:
        return scales, jnp.full(scales.shape, 2 ** (grid.bits - 1), jnp.uint8)
    zeros = jnp.clip(jnp.round(-low / scales.astype(jnp.float32)), grid.least_zero, grid.top)
    return scales, zeros.astype(jnp.uint8)


@partial(jax.jit, static_argnames="grid")
def fit_closest(weight: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """``fit`` with the shrink of each group that keeps its rounded weights closest, in squares."""
    groups = -1, grid.group_size, weight.shape[1]

    def loss(shrink: jax.Array) -> jax.Array:
        error: jax.Array = round_to_nearest(weight, grid, shrink).value() - weight
        return (error**2).reshape(groups).sum(1)

    scales, zeros = fit(weight, grid, best_shrink(loss))
    return scales, zeros


def best_shrink(loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The one of 1 … 0.5 that makes ``loss`` smallest, for each of its elements; the larger of equals."""
    shrinks = jnp.array(_SHRINKS, jnp.float32)
    return shrinks[jnp.argmin(lax.map(loss, shrinks), axis=0)]


@partial(jax.jit, static_argnames="grid")
def round_to(
    weight: jax.Array, scales: jax.Array, zeros: jax.Array, grid: Grid, groups: jax.Array | None = None
) -> Rounded:
    """``weight`` [K, N] on the nearest integers of ``grid``; the rest is as in ``Rounded``."""
    inputs = weight.shape[0]
    q = nearest(weight, per_input(scales, inputs, groups), per_input(zeros, inputs, groups), grid.top)
    return Rounded(q.astype(jnp.uint8), scales, zeros, groups)


@partial(jax.jit, static_argnames="grid")
def round_to_nearest(weight: jax.Array, grid: Grid, shrink: jax.Array | None = None) -> Rounded:
    """``weight`` [K, N] rounded with scales fitted to it; ``shrink`` as in ``fit``."""
    scales, zeros = fit(weight, grid, shrink)
    rounded: Rounded = round_to(weight, scales, zeros, grid)
    return rounded


@jax.jit
def round_channels(weight: jax.Array) -> ChannelRounded:
    """``weight`` [K, N] in int8, one scale for an output: max|w| / 127 (1 where all are zero)."""
    scales = channel_scales(weight, axis=0)
    return ChannelRounded(jnp.round(weight / scales).astype(jnp.int8), scales)


def channel_scales(values: jax.Array, axis: int) -> jax.Array:
    """Scales of symmetric int8 for what lies along ``axis`` of ``values``: max|x| / 127, 1 where all are zero."""
    peak = jnp.abs(values).max(axis)
    return jnp.where(peak > 0, peak / _INT8_TOP, 1)


def nearest(weight: jax.Array, scale: jax.Array, zero: jax.Array, top: int) -> jax.Array:
    """The integer 0 … ``top`` nearest to each weight, as float32; all three float32 of shapes that broadcast."""
    return jnp.clip(jnp.round(weight / scale) + zero, 0, top)


def per_input(values: jax.Array, inputs: int, groups: jax.Array | None) -> jax.Array:
    """``values`` [G, N] of groups → float32 [K, N] of ``inputs``; ``groups`` as in ``Rounded``."""
    values = values.astype(jnp.float32)
    return jnp.repeat(values, inputs // values.shape[0], axis=0) if groups is None else values[groups]
