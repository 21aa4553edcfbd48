"""Parameters, as arrays or as shapes, that name their logical axes."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

Axes = tuple[str | None, ...]
Leaf = nnx.Param[jax.Array]


def leaf(shape: tuple[int, ...], dtype: Any, axes: Axes) -> Leaf:
    """A parameter that is still a shape."""
    shaped: Any = jax.ShapeDtypeStruct(shape, dtype)
    return nnx.Param(shaped, axes=axes)


def axes_of(param: nnx.Param[Any]) -> Axes:
    """The logical axes of a parameter."""
    axes: Axes = param.axes
    return axes
