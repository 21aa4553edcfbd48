"""SmoothQuant (arXiv:2211.10438): weights and activations in int8, outliers of the activations moved into the weights.

Inputs are divided by s = peak|x|^α / peak|w|^(1−α), in what produces them, and the weights multiplied by it. α is
searched by the error of the linear's outputs with both sides rounded: weights per output, activations per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdeploy.compress.grid import channel_scales, round_channels
from jaxdeploy.compress.layer_view import Fold, LayerView
from jaxdeploy.compress.methods.scaling import centred, losses, matmul, relative, scaled_together, search
from jaxdeploy.config import QuantConfig

_ALPHAS = tuple(step / 20 for step in range(21))


@dataclass(frozen=True)
class SmoothQuant:
    """Smooths what can be smoothed, and rounds every linear to int8."""

    needs_gram: bool = False

    def quantize_layer(self, layer: LayerView) -> None:
        """See ``registry.Method``."""
        notes: dict[str, str] = {}
        for fold in layer.folds:
            notes |= dict.fromkeys(fold.linears, _smooth(layer, fold))
        for name in layer.linears:
            layer.store(name, round_channels(layer.weight(name)), notes.get(name, ""))


def _smooth(layer: LayerView, fold: Fold) -> str:
    """Apply the factors with which the fold's linears lose least, if any; returns a note for the report."""
    _, inputs, weight = scaled_together(layer, fold)
    peak, weight_peak = (relative(fold.tie(values)) for values in (inputs.peak, jnp.abs(weight).max(1)))
    alphas = jnp.array(_ALPHAS, jnp.float32)[:, None]
    none = jnp.ones((1, weight.shape[0]), jnp.float32)
    factors = jnp.concatenate([none, centred(peak**alphas / weight_peak ** (1 - alphas))])
    best, note = search(weight, inputs, factors, smooth_losses)
    if best > 0:
        fold.apply(factors[best])
    return note


@jax.jit
def smooth_losses(weight: jax.Array, sample: jax.Array, factors: jax.Array) -> jax.Array:
    """``scaling.losses`` of ``factors`` [A, K] where weights and activations are rounded to int8."""
    return losses(weight, sample, factors, lambda x, w: matmul(_rounded_tokens(x), round_channels(w).value()))


def _rounded_tokens(x: jax.Array) -> jax.Array:
    """``x`` [T, K] as the int8 of each token stands for it."""
    scales = channel_scales(x, axis=1)[:, None]
    return jnp.round(x / scales) * scales


def make(config: QuantConfig) -> SmoothQuant:
    """See ``registry.MethodModule``."""
    return SmoothQuant()
