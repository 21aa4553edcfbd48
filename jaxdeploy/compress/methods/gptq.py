"""GPTQ (arXiv:2210.17323): round one input after the other, and let those still to come make up for the error.

With H the mean of x xᵀ and e = w − q, a column w of the weight costs eᵀ H e. Write H = Aᵀ D A, A unit lower triangular
and D diagonal: the cost is Σᵢ Dᵢ (eᵢ + Σⱼ Aᵢⱼ eⱼ)² over j < i, so that rounding in order means to put qᵢ next to
wᵢ + Σⱼ Aᵢⱼ eⱼ. These are the paper's integers (arXiv:2507.18553 shows that they are Babai's nearest plane), but nothing
is inverted, which float32 would not bear well.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxdeploy.compress.grid import Grid, Rounded, fit_closest, nearest, per_input
from jaxdeploy.compress.layer_view import LayerView, inputs_in_order
from jaxdeploy.compress.methods.scaling import matmul, store_better
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import JaxdeployError

logger = logging.getLogger("jaxdeploy")

_BLOCK = 128
_DAMP_TRIES = 5
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class GPTQ:
    """Rounds each linear for the inputs it gets once those before it are rounded."""

    damp: float
    act_order: bool
    static_groups: bool
    true_sequential: bool
    needs_gram: bool = True

    def quantize_layer(self, layer: LayerView) -> None:
        """See ``registry.Method``. Raises ``JaxdeployError`` where the inputs of a linear are not finite."""
        for name, inputs in inputs_in_order(layer, sequential=self.true_sequential):
            assert inputs.gram is not None, "needs_gram was not heeded"
            try:
                rounded = self.round(layer.weight(name), inputs.gram, layer.grid(name))
            except JaxdeployError as error:
                raise JaxdeployError(f"{name}: {error}") from None
            store_better(layer, name, rounded, inputs.unseen, "")

    def round(self, weight: jax.Array, gram: jax.Array, grid: Grid) -> Rounded:
        """``weight`` [K, N] on ``grid`` for inputs of mean x xᵀ ``gram`` [K, K].

        Raises:
            JaxdeployError: ``gram`` cannot be factorised, however much is added to its diagonal.
        """
        order = jnp.argsort(-jnp.diag(gram)) if self.act_order else None
        factor = damped_factor(gram if order is None else gram[order][:, order], self.damp)
        static = self.static_groups or grid.group_size == weight.shape[0]
        rounded: Rounded = round_in_order(weight, factor, order, grid, static)
        return rounded


def damped_factor(gram: jax.Array, damp: float) -> jax.Array:
    """``factorised`` with ten times the damping, again and again, until it succeeds.

    Raises:
        JaxdeployError: it did not in five tries.
    """
    for _ in range(_DAMP_TRIES):
        factor: jax.Array = factorised(gram, jnp.float32(damp))
        if bool(jnp.isfinite(factor).all()):
            return factor
        logger.info("damp=%g is too little for these inputs; trying ten times as much", damp)
        damp *= 10
    raise JaxdeployError("its inputs are not finite or overflow; look at the calibration text and the checkpoint")


@jax.jit
def factorised(gram: jax.Array, damp: jax.Array) -> jax.Array:
    """A [K, K], unit lower triangular, with Aᵀ D A = ``gram`` + damp · mean(diag ``gram``) · I.

    Not finite where that is not positive definite. An input that was never there has a row and column of I, and is
    rounded to nearest.
    """
    inputs = jnp.arange(gram.shape[0])
    mean = jnp.mean(jnp.diag(gram))
    damped = gram.at[inputs, inputs].add(damp * jnp.where(mean > 0, mean, 1))
    factor = lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1].T
    return factor / jnp.diag(factor)[:, None]


@partial(jax.jit, static_argnames=("grid", "static"))
def round_in_order(weight: jax.Array, factor: jax.Array, order: jax.Array | None, grid: Grid, static: bool) -> Rounded:
    """Round the inputs of ``weight`` [K, N] in the order of ``order`` int32 [K] (``None``: as they come).

    ``factor`` [K, K] is ``factorised`` of the gram in that order. ``static``: groups are of neighbouring inputs, their
    scales those of the weight as it is; otherwise they are of inputs that follow one another in ``order``, and their
    scales are fitted when their turn comes, to what the errors so far ask of them.
    """
    inputs = weight.shape[0]
    size = math.gcd(inputs, _BLOCK) if static else grid.group_size
    index = jnp.arange(inputs)
    groups = (index if order is None or not static else order) // grid.group_size
    ordered = weight if order is None else weight[order]

    def block(number: jax.Array, state: _State) -> _State:
        errors, q, scales, zeros = state
        start = number * size
        w, rows, group = (lax.dynamic_slice_in_dim(x, start, size) for x in (ordered, factor, groups))
        within = lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        carried = matmul(rows, errors)
        if not static:
            ask = lax.linalg.triangular_solve(within, carried, left_side=True, lower=True, unit_diagonal=True)
            scale, zero = fit_closest(w + ask, grid)
            scales, zeros = _put(scales, scale, number), _put(zeros, zero, number)
        mine, middle = (per_input(x, size, group) for x in (scales, zeros))
        block_errors, block_q = _round_block(w, carried, within, mine, middle, grid.top)
        return _put(errors, block_errors, start), _put(q, block_q, start), scales, zeros

    start = jnp.zeros_like(weight), jnp.zeros(weight.shape, jnp.uint8), *fit_closest(weight, grid)
    _, q, scales, zeros = lax.fori_loop(0, inputs // size, block, start)
    if order is None:
        return Rounded(q, scales, zeros)
    back = jnp.argsort(order)
    return Rounded(q[back], scales, zeros, None if static else groups[back])


def _round_block(
    w: jax.Array, carried: jax.Array, within: jax.Array, scales: jax.Array, zeros: jax.Array, top: int
) -> tuple[jax.Array, jax.Array]:
    """The errors float32 and integers uint8 [B, N] of a block ``w`` whose inputs get ``carried`` from those before."""

    def row(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        errors, q = state
        wanted = w[i] + carried[i] + matmul(within[i], errors)
        nearest_q = nearest(wanted, scales[i], zeros[i], top)
        error = w[i] - (nearest_q - zeros[i]) * scales[i]
        return errors.at[i].set(error), q.at[i].set(nearest_q.astype(jnp.uint8))

    rounded: tuple[jax.Array, jax.Array] = lax.fori_loop(
        0, w.shape[0], row, (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8))
    )
    return rounded


def _put(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


def make(config: QuantConfig) -> GPTQ:
    """See ``registry.MethodModule``."""
    return GPTQ(config.damp, config.act_order, config.static_groups, config.true_sequential)
