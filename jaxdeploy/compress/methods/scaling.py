"""Factors for a linear's inputs, and the choice among them: what AWQ and SmoothQuant share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_LEAST = 1e-4


def relative(values: jax.Array) -> jax.Array:
    """Magnitudes ``values`` [K] over their mean, at least 1e-4; 1 for an input that was never there."""
    mean = jnp.mean(values)
    return jnp.where(values > 0, jnp.maximum(values / jnp.where(mean > 0, mean, 1), _LEAST), 1)


def centred(factors: jax.Array) -> jax.Array:
    """``factors`` [..., K] over √(max · min), within 1e-4 … 1e4: as much below 1 as above."""
    middle = jnp.sqrt(factors.max(-1, keepdims=True) * factors.min(-1, keepdims=True))
    return jnp.clip(factors / middle, _LEAST, 1 / _LEAST)


def losses(
    weight: jax.Array, sample: jax.Array, factors: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """What each of A ``factors`` [A, K] costs: the mean squared error, float32 [A], of a linear's outputs.

    ``weight`` [K, N] and ``sample`` [T, K] give the right outputs; ``product`` is handed the scaled ones of both and
    gives the outputs [T, N] as they are once quantised. Call it under ``jit``: one candidate is in memory at a time.
    """
    exact = matmul(sample, weight)

    def loss(s: jax.Array) -> jax.Array:
        return jnp.mean((product(sample / s, weight * s[:, None]) - exact) ** 2)

    return jnp.asarray(lax.map(loss, factors))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in float32 proper, also where a GPU would round the operands."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
