"""Factors for a linear's inputs, the choice among them, and the test of what a search found on unseen inputs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxdeploy.compress.grid import Rounded, round_to_nearest
from jaxdeploy.compress.layer_view import Fold, Inputs, LayerView

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


Losses = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""The losses [A] of a weight and a sample with each of A factors."""


def search(weight: jax.Array, inputs: Inputs, factors: jax.Array, losses_of: Losses) -> tuple[int, str]:
    """Return the number of the best of ``factors`` [A, K], of which the first are all 1, and a note for the report.

    The best are those with the least loss on the sample. They are tested on inputs that the search has not seen: the
    number is 0 if they are no better there than the first, and the note then says so.
    """
    best = int(jnp.argmin(losses_of(weight, inputs.sample, factors)))
    if best == 0 or inputs.unseen is None:
        return best, ""
    none, found = losses_of(weight, inputs.unseen, factors[jnp.array([0, best])])
    return (best, "") if found < none else (0, "scales lost on unseen text")


def scaled_together(layer: LayerView, fold: Fold) -> tuple[str, Inputs, jax.Array]:
    """Return the linears of ``fold`` that are quantised as one.

    The result is the name of the first, their common inputs, and their weights [K, N1 + N2 + ...].
    """
    first, *others = (name for name in fold.linears if name in layer.linears)
    inputs = layer.inputs(first)
    weights = [layer.weight(name) for name in (first, *others)]
    return first, inputs, weights[0] if not others else jnp.concatenate(weights, axis=1)


def store_better(layer: LayerView, name: str, found: Rounded, unseen: jax.Array | None, note: str) -> None:
    """Store ``found`` for a linear, or its weight rounded to nearest if that has the smaller error on ``unseen``."""
    weight = layer.weight(name)
    if unseen is not None:
        plain = round_to_nearest(weight, layer.grid(name))
        if not output_error(weight, unseen, found.value()) < output_error(weight, unseen, plain.value()):
            found, note = plain, ", ".join(part for part in (note, "rounding lost on unseen text") if part)
    layer.store(name, found, note)


@jax.jit
def output_error(weight: jax.Array, sample: jax.Array, value: jax.Array) -> jax.Array:
    """The mean squared error of a linear's outputs with ``value`` [K, N] in place of ``weight``."""
    return jnp.mean(matmul(sample, value - weight) ** 2)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in float32 proper, also where a GPU would round the operands."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
