"""AWQ (arXiv:2306.00978): finer steps for inputs that carry large activations, then spans clipped where that pays.

Inputs are multiplied by s = (mean |x|)^α and what produces them is divided by s, so that the weights of busy inputs get
finer steps. α is searched by the error of the linear's outputs on a sample of its inputs. So is the share of its span
that each group keeps. A result that loses on inputs outside the sample is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxdeploy.compress.grid import Grid, best_shrink, round_to_nearest
from jaxdeploy.compress.layer_view import Fold, LayerView, inputs_in_order
from jaxdeploy.compress.methods.scaling import centred, losses, matmul, relative, scaled_together, search, store_better
from jaxdeploy.config import QuantConfig

_ALPHAS = tuple(step / 20 for step in range(21))
_USUAL_ALPHA = 0.5


@dataclass(frozen=True)
class AWQ:
    """Scales inputs, clips spans, rounds to nearest."""

    search_scale: bool
    search_clip: bool
    true_sequential: bool
    needs_gram: bool = False

    def quantize_layer(self, layer: LayerView) -> None:
        """See ``registry.Method``."""
        notes: dict[str, str] = {}
        for fold in layer.folds:
            notes |= dict.fromkeys(fold.linears, self._scale(layer, fold))
        if not self.search_clip:
            for name in layer.linears:
                layer.store(name, round_to_nearest(layer.weight(name), layer.grid(name)), notes.get(name, ""))
            return
        for name, inputs in inputs_in_order(layer, sequential=self.true_sequential):
            weight, grid = layer.weight(name), layer.grid(name)
            clipped = round_to_nearest(weight, grid, group_shrinks(weight, inputs.sample, grid))
            store_better(layer, name, clipped, inputs.unseen, notes.get(name, ""))

    def _scale(self, layer: LayerView, fold: Fold) -> str:
        """Scale the inputs of the fold's linears if that helps; returns a note for the report."""
        name, inputs, weight = scaled_together(layer, fold)
        activity = relative(fold.tie(inputs.mean_abs))
        if not self.search_scale:
            fold.apply(centred(activity**_USUAL_ALPHA))
            return ""
        factors = centred(activity ** jnp.array(_ALPHAS, jnp.float32)[:, None])
        losses_of = partial(scale_losses, grid=layer.grid(name))
        best, note = search(weight, inputs, factors, losses_of)
        if best > 0:  # the first, α = 0, leaves everything as it is
            fold.apply(factors[best])
        return note


@partial(jax.jit, static_argnames="grid")
def scale_losses(weight: jax.Array, sample: jax.Array, factors: jax.Array, grid: Grid) -> jax.Array:
    """``scaling.losses`` of ``factors`` [A, K] for weights rounded to nearest on ``grid``."""
    return losses(weight, sample, factors, lambda x, w: matmul(x, round_to_nearest(w, grid).value()))


@partial(jax.jit, static_argnames="grid")
def group_shrinks(weight: jax.Array, sample: jax.Array, grid: Grid) -> jax.Array:
    """How much of its span each group should keep, 1 … 0.5, float32 [G, N].

    ``weight`` is [K, N], ``sample`` [T, K]. A group's share is the one that makes the error of its own contribution to
    the outputs smallest. An output where all of its groups together get worse by that keeps its spans whole.
    """
    size, tokens = grid.group_size, sample.shape[0]
    groups = weight.reshape(-1, size, weight.shape[1])
    samples = sample.reshape(tokens, -1, size).swapaxes(0, 1)
    shrink = lax.map(lambda group: _group_shrink(group[0], group[1], grid), (groups, samples))
    clipped, whole = (_output_loss(weight, sample, grid, ratio) for ratio in (shrink, jnp.ones_like(shrink)))
    return jnp.where(clipped < whole, shrink, 1)


def _group_shrink(weight: jax.Array, sample: jax.Array, grid: Grid) -> jax.Array:
    """The best shares [N] of a group ``weight`` [g, N] with inputs ``sample`` [T, g]."""
    tokens, size = sample.shape
    gram = matmul(sample.T, sample) if size < tokens else None

    def loss(ratio: jax.Array) -> jax.Array:
        error = round_to_nearest(weight, grid, ratio).value() - weight
        return (matmul(sample, error) ** 2 if gram is None else error * matmul(gram, error)).sum(0)

    return best_shrink(loss)


def _output_loss(weight: jax.Array, sample: jax.Array, grid: Grid, shrink: jax.Array) -> jax.Array:
    """The squared error [N] of the outputs on ``sample``."""
    return (matmul(sample, round_to_nearest(weight, grid, shrink).value() - weight) ** 2).sum(0)


def make(config: QuantConfig) -> AWQ:
    """See ``registry.MethodModule``."""
    return AWQ(config.search_scale, config.search_clip, config.true_sequential)
