"""Parameters, as arrays or as shapes, that name their logical axes and know how random ones are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]
Leaf = nnx.Param[jax.Array]
Draw = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
"""Key, shape and dtype → a random parameter. Parameters that are no floats of the model ignore the dtype."""

DEVIATION = 0.02


def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Draw from N(0, 0.02²)."""
    return DEVIATION * jax.random.normal(key, shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Return ones: the scale of a norm."""
    return jnp.ones(shape, dtype)


def leaf(shape: tuple[int, ...], dtype: Any, axes: Axes, draw: Draw) -> Leaf:
    """Return a parameter that is still a shape."""
    shaped: Any = jax.ShapeDtypeStruct(shape, dtype)
    return nnx.Param(shaped, axes=axes, draw=draw)


def axes_of(param: nnx.Param[Any]) -> Axes:
    """The logical axes of a parameter."""
    axes: Axes = param.axes
    return axes


def draw_of(param: nnx.Param[Any]) -> Draw:
    """How a random array for a parameter is drawn."""
    draw: Draw = param.draw
    return draw
