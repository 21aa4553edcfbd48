"""How far a kernel may be from the exact result: bounds that follow from its dtypes and the length of its sums."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

ACCUMULATOR = float(jnp.finfo(jnp.float32).eps) / 2
"""Unit roundoff of the float32 that every kernel accumulates in."""


def unit_roundoff(dtype: DTypeLike) -> float:
    """Largest relative error of rounding to ``dtype``."""
    return float(jnp.finfo(dtype).eps) / 2


def sum_bound(
    exact: Array, magnitude: Array, terms: int, out_dtype: DTypeLike, *, operand_roundoff: float = 0.0
) -> Array:
    """Largest believable error of sums of ``terms`` products, accumulated in float32 and rounded to ``out_dtype``.

    ``exact`` are the sums in float64, ``magnitude`` the sums of the products' absolute values. ``operand_roundoff`` is
    the relative error that a product may already carry (operands that the kernel itself rounds). Rounding errors of a
    float32 sum grow like the root of its length (Higham, Accuracy and Stability of Numerical Algorithms, §4.2); twice
    that leaves room for the largest of many sums.
    """
    summing = 2 * ACCUMULATOR * np.sqrt(terms) + operand_roundoff
    bound: Array = unit_roundoff(out_dtype) * np.abs(exact) + summing * magnitude
    return bound
