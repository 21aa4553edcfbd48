"""Quantisation methods: against their papers' plain algorithms, and what they promise about output errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.compress.grid import ChannelRounded, Grid, Rounded, fit_closest, round_to, round_to_nearest
from jaxdeploy.compress.layer_view import Inputs
from jaxdeploy.compress.methods import awq, gptq
from jaxdeploy.compress.registry import METHODS, make_method
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import JaxdeployError

Array = np.ndarray[Any, Any]
GRID = Grid(4, 32, False)
K, N = 128, 64


def correlated(seed: int, tokens: int = 600, inputs: int = K) -> Array:
    """Inputs that share a few directions, as those of real layers do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 12)) @ rng.normal(size=(12, inputs)) + 0.5 * rng.normal(size=(tokens, inputs))
    return np.asarray(x * np.exp(0.5 * rng.normal(size=inputs)), np.float32)


def gram_of(x: Array) -> jax.Array:
    return jnp.asarray(x.T @ x / len(x))


def weight(seed: int, inputs: int = K, outputs: int = N) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.05, (inputs, outputs)).astype(np.float32))


def method(name: str, **options: Any) -> Any:
    return make_method(QuantConfig(method=name, **options))


def output_error(x: Array, exact: Any, value: Any) -> float:
    return float(np.mean((x.astype(np.float64) @ (np.asarray(value, np.float64) - np.asarray(exact, np.float64))) ** 2))


class Toy:
    """x·norm → up → relu → down, whose two linears can both be scaled. It keeps a list of what is done to it."""

    def __init__(self, x: Array, weights: dict[str, jax.Array], grid: Grid = GRID, *, pooled: bool = False) -> None:
        self.linears: tuple[str, ...] = ("up", "down")
        self.x, self.norm, self.weights, self.fits = jnp.asarray(x), jnp.ones(x.shape[1]), dict(weights), grid
        self.folds: tuple[ToyFold, ...] = tuple(ToyFold(self, name, pooled) for name in self.linears)
        self.stored: dict[str, Rounded | ChannelRounded] = {}
        self.events: list[str] = []
        self.notes: dict[str, str] = {}
        self.unseen: Array | None = None

    def grid(self, name: str) -> Grid:
        return self.fits

    def weight(self, name: str) -> jax.Array:
        return self.stored[name].value() if name in self.stored else self.weights[name]

    def into(self, name: str) -> jax.Array:
        up = self.x * self.norm
        return up if name == "up" else jax.nn.relu(up @ self.weight("up"))

    def inputs(self, name: str) -> Inputs:
        self.events.append(f"inputs {name}")
        x, size = self.into(name), jnp.abs(self.into(name))
        unseen = None if self.unseen is None else jnp.asarray(self.unseen) * self.norm
        return Inputs(len(x), size.mean(0), size.max(0), x, x.T @ x / jnp.float32(len(x)), unseen)

    def store(self, name: str, rounded: Rounded | ChannelRounded, note: str = "") -> None:
        self.events.append(f"store {name}")
        self.stored[name] = rounded
        self.notes[name] = note

    def output(self, quantize: Callable[[Array], Array] = lambda x: x) -> Array:
        """With ``quantize`` applied to every linear's inputs."""
        return np.asarray(quantize(np.maximum(self.between(quantize), 0)) @ np.asarray(self.weight("down")))

    def between(self, quantize: Callable[[Array], Array] = lambda x: x) -> Array:
        """The outputs of the first linear."""
        return np.asarray(quantize(np.asarray(self.into("up"))) @ np.asarray(self.weight("up")))


@dataclass
class ToyFold:
    layer: Toy
    linear: str
    pooled: bool
    applied: list[Array] = field(default_factory=list)

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.linear,)

    def tie(self, values: jax.Array) -> jax.Array:
        return jnp.repeat(values.reshape(-1, 2).max(1), 2) if self.pooled else values

    def apply(self, factors: jax.Array) -> None:
        assert not self.layer.stored, "a fold changes its producer, which is rounded already"
        self.applied.append(np.asarray(factors))
        weights = self.layer.weights
        weights[self.linear] = weights[self.linear] * factors[:, None]
        if self.linear == "up":
            self.layer.norm = self.layer.norm / factors
        else:
            weights["up"] = weights["up"] / factors


def single(seed: int) -> Toy:
    """A toy whose first linear alone is quantised."""
    layer = toy(seed)
    layer.linears, layer.folds = ("up",), layer.folds[:1]
    return layer


def toy(seed: int, grid: Grid = GRID, *, outliers: int = 3, pooled: bool = False) -> Toy:
    """A toy whose inputs are correlated; so many of them are 30 times as large as the rest."""
    x = np.random.default_rng(seed).normal(size=(256, K)).astype(np.float32)
    x[:, np.random.default_rng(seed + 100).permutation(K)[:outliers]] *= 30
    return Toy(x, {"up": weight(seed + 1), "down": weight(seed + 2, N)}, grid, pooled=pooled)


def textbook_gptq(w: Array, hessian: Array, grid: Grid, order: Array, damp: float, static: bool) -> Array:
    """GPTQ as the paper writes it, unblocked, in float64: the integers [K, N]."""
    inputs = len(w)
    damped = hessian + damp * np.mean(np.diag(hessian)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    scales, zeros = fit_closest(jnp.asarray(w), grid)
    left, q = w.astype(np.float64)[order], np.zeros(w.shape, int)
    for i in range(inputs):
        group = (order[i] if static else i) // grid.group_size
        if not static and i % grid.group_size == 0:
            now = jnp.asarray(left[i : i + grid.group_size].astype(np.float32))
            scale, zero = fit_closest(now, grid)
            scales, zeros = scales.at[group].set(scale[0]), zeros.at[group].set(zero[0])
        scale, zero = np.asarray(scales[group], np.float64), np.asarray(zeros[group], np.float64)
        q[order[i]] = np.clip(np.round(left[i] / scale) + zero, 0, grid.top)
        error = (left[i] - (q[order[i]] - zero) * scale) / upper[i, i]
        left[i:] -= np.outer(upper[i, i:], error)
    return q


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_gptq_is_the_papers(act_order: bool, static: bool) -> None:
    """Blocks and a factor of H in place of H⁻¹ change nothing but rare ties. K = 192 is a block and a half of 128."""
    x, w = correlated(0, inputs=192), weight(0, 192)
    gram, damp = gram_of(x), 0.01
    made = method("gptq", act_order=act_order, static_groups=static, damp=damp).round(w, gram, GRID)
    order = np.asarray(jnp.argsort(-jnp.diag(gram))) if act_order else np.arange(192)
    expected = textbook_gptq(np.asarray(w), np.asarray(gram, np.float64), GRID, order, damp, static)
    # A tie that falls the other way moves what follows in its column.
    columns = (np.asarray(made.q) != expected).any(0)
    assert columns.mean() < 0.1
    assert (np.asarray(round_to_nearest(w, GRID).q) != expected).any(0).all()


def test_gptq_of_independent_inputs_rounds_to_nearest() -> None:
    w = weight(1)
    made = gptq.GPTQ(0.01, act_order=True, static_groups=True, true_sequential=True).round(w, jnp.eye(K), GRID)
    expected = round_to(w, *fit_closest(w, GRID), GRID)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_loses_on_weights_and_wins_on_outputs(bits: int) -> None:
    (x, unseen), w, grid = np.split(correlated(2, tokens=1200), 2), weight(2), Grid(bits, 32, False)
    nearest, made = round_to_nearest(w, grid), method("gptq").round(w, gram_of(x), grid)
    assert output_error(np.eye(K), w, made.value()) > 1.1 * output_error(np.eye(K), w, nearest.value())
    assert output_error(x, w, made.value()) < 0.5 * output_error(x, w, nearest.value())
    assert output_error(unseen, w, made.value()) < output_error(unseen, w, nearest.value())


def test_groups_of_act_order() -> None:
    w, gram = weight(3), gram_of(correlated(3))
    scattered = method("gptq", static_groups=False).round(w, gram, GRID)
    np.testing.assert_array_equal(np.bincount(scattered.groups), [32] * 4)
    assert (np.diff(np.asarray(scattered.groups)) < 0).any()
    busiest = np.argsort(-np.diag(gram), kind="stable")[:32]
    np.testing.assert_array_equal(scattered.groups[busiest], 0)
    assert method("gptq").round(w, gram, GRID).groups is None
    assert method("gptq", static_groups=False).round(w, gram, Grid(4, K, False)).groups is None


def test_inputs_that_never_came_are_rounded_to_nearest() -> None:
    x, w, dead = correlated(4), weight(4), [3, 40, 41]
    x[:, dead] = 0
    made = method("gptq").round(w, gram_of(x), GRID)
    expected = round_to(w, made.scales, made.zeros, GRID)
    np.testing.assert_array_equal(made.q[jnp.array(dead)], expected.q[jnp.array(dead)])
    assert (np.asarray(made.q) != np.asarray(expected.q)).any()


def test_damping_grows_until_it_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    broken = gram_of(correlated(5)).at[0, 0].set(-1.0)
    with caplog.at_level(logging.INFO, "jaxdeploy"):
        made = method("gptq").round(weight(5), broken, GRID)
    assert "damp=0.01" in caplog.text
    assert np.isfinite(made.value()).all()
    caplog.clear()
    method("gptq").round(weight(5), gram_of(correlated(5)), GRID)
    assert not caplog.text


def test_inputs_that_are_not_finite_are_an_error() -> None:
    layer = toy(0)
    layer.x = layer.x.at[0, 0].set(jnp.nan)
    with pytest.raises(JaxdeployError, match=r"up: .* not finite"):
        method("gptq").quantize_layer(layer)


@pytest.mark.parametrize("name", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_true_sequential_looks_again(name: str) -> None:
    layer = toy(1)
    method(name).quantize_layer(layer)
    assert layer.events[-4:] == ["inputs up", "store up", "inputs down", "store down"]
    layer = toy(1)
    method(name, true_sequential=False).quantize_layer(layer)
    assert layer.events[-4:] == ["inputs up", "inputs down", "store up", "store down"]


def recovered(by_method: float, by_rounding: float) -> float:
    """1 − mse(method) / mse(round to nearest): the share of what rounding loses that the method wins back."""
    return 1 - by_method / by_rounding


@pytest.mark.parametrize("seed", range(4))
def test_awq_recovers_from_outliers(seed: int) -> None:
    """Three of 128 inputs are 30 times as large, weights are alike: half of what rounding to nearest loses is won."""
    exact, losses = single(seed).between(), {}
    for name in ("rtn", "awq"):
        layer = single(seed)
        method(name).quantize_layer(layer)
        losses[name] = float(np.mean((layer.between() - exact) ** 2))
    assert recovered(losses["awq"], losses["rtn"]) >= 0.5


def int8_tokens(x: Array) -> Array:
    scales = np.abs(x).max(1, keepdims=True) / 127
    return np.asarray(np.round(x / scales) * scales)


@pytest.mark.parametrize("seed", range(4))
def test_smooth_quant_recovers_from_outliers(seed: int) -> None:
    """As for AWQ; both sides in int8, against the same without smoothing."""
    exact, losses = single(seed).between(), {}
    for name in ("plain", "smooth"):
        layer = single(seed)
        layer.folds = layer.folds if name == "smooth" else ()
        method("smooth_quant").quantize_layer(layer)
        losses[name] = float(np.mean((layer.between(int8_tokens) - exact) ** 2))
    assert recovered(losses["smooth"], losses["plain"]) >= 0.85


@pytest.mark.parametrize("name", ["awq", "smooth_quant"])
def test_folds_leave_the_layer_as_it_is(name: str) -> None:
    """Only rounding changes outputs, and factors are the same where the fold ties them."""
    layer, exact = toy(2, pooled=True), toy(2).output()
    method(name).quantize_layer(layer)
    factors = [applied for fold in layer.folds for applied in fold.applied]
    assert factors
    for applied in factors:
        np.testing.assert_array_equal(applied[::2], applied[1::2])
    layer.stored.clear()
    np.testing.assert_allclose(layer.output(), exact, rtol=1e-3, atol=1e-3)


def test_smooth_quants_factors_are_the_papers() -> None:
    """peak|x|^α / peak|w|^(1−α) for an α of the search, but for what they have in common."""
    layer = single(3)
    layer.weights["up"] = layer.weights["up"] * jnp.linspace(0.1, 2, K)[:, None]
    peak, weight_peak = np.abs(np.asarray(layer.x)).max(0), np.abs(np.asarray(layer.weights["up"])).max(1)
    method("smooth_quant").quantize_layer(layer)
    (factors,) = layer.folds[0].applied
    candidates = np.stack([peak**alpha / weight_peak ** (1 - alpha) for alpha in np.linspace(0.05, 0.95, 19)])
    common = factors / candidates
    assert np.ptp(np.log(common), axis=1).min() < 1e-3


def test_nothing_is_scaled_where_it_does_not_help() -> None:
    """Inputs all alike: α = 0 is best, and the layer keeps its weights."""
    layer = toy(3, outliers=0)
    layer.x = jnp.sign(layer.x)
    method("awq").quantize_layer(layer)
    assert not layer.folds[0].applied


def test_awqs_options() -> None:
    layer = toy(4)
    activity = np.abs(np.asarray(layer.x)).mean(0)
    method("awq", search_scale=False, search_clip=False).quantize_layer(layer)
    (factors,) = layer.folds[0].applied
    np.testing.assert_allclose(factors / factors[0], np.sqrt(activity / activity[0]), rtol=1e-5)
    assert factors.max() * factors.min() == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(layer.stored["up"].value(), round_to_nearest(layer.weights["up"], GRID).value())
    method("awq").quantize_layer(clipped := toy(4))
    assert not np.array_equal(clipped.stored["up"].value(), round_to_nearest(clipped.weights["up"], GRID).value())


@pytest.mark.parametrize("grid", [Grid(3, 32, False), Grid(4, K, True)], ids=str)
def test_clipping_never_loses_on_the_sample(grid: Grid) -> None:
    """Also where groups add up badly: columns that lose keep their spans. Half the outputs and more are won."""
    x = correlated(6, tokens=64)
    w = jnp.asarray(np.random.default_rng(6).standard_t(4, (K, N)).astype(np.float32))
    shrink = awq.group_shrinks(w, jnp.asarray(x), grid)
    assert shrink.shape == (K // grid.group_size, N)
    losses = [
        ((x @ (np.asarray(value) - np.asarray(w))) ** 2).sum(0)
        for value in (round_to_nearest(w, grid, shrink).value(), round_to_nearest(w, grid).value())
    ]
    assert (losses[0] <= losses[1] * (1 + 1e-4)).all()
    assert (losses[0] < 0.95 * losses[1]).mean() > 0.5


def test_every_method_is_there() -> None:
    needs = {name: method(name).needs_gram for name in METHODS}
    assert needs == {name: name == "gptq" for name in ("awq", "calibrate", "gptq", "rtn", "smooth_quant")}
    layer = toy(5)
    method("calibrate").quantize_layer(layer)
    assert not layer.events
    method("rtn").quantize_layer(layer)
    assert layer.events == ["store up", "store down"]


# What loses on inputs that the search has not seen is not used


def shifted(seed: int) -> Toy:
    """A toy of one linear. Its outliers are those of the sample alone: unseen inputs have theirs elsewhere."""
    layer = single(seed)
    layer.unseen = np.roll(np.asarray(layer.x), 1, axis=1)
    return layer


@pytest.mark.parametrize("name", ["awq", "gptq", "smooth_quant"])
def test_what_loses_on_unseen_inputs_is_not_used(name: str) -> None:
    layer, plain = shifted(7), single(7)
    exact = layer.weight("up")
    method(name).quantize_layer(layer)
    method("rtn" if name != "smooth_quant" else name).quantize_layer(plain)
    assert "lost on unseen text" in layer.notes["up"]
    assert layer.unseen is not None
    if name == "smooth_quant":
        assert not layer.folds[0].applied
        return
    found, nearest = (output_error(layer.unseen, exact, toy.stored["up"].value()) for toy in (layer, plain))
    assert found == nearest


@pytest.mark.parametrize("name", ["awq", "gptq", "smooth_quant"])
def test_what_wins_on_unseen_inputs_is_used(name: str) -> None:
    """Inputs like those of the sample: the result is that of a search without a test."""
    tested, untested = single(7), single(7)
    tested.unseen = np.asarray(tested.x)
    for layer in (tested, untested):
        method(name).quantize_layer(layer)
    assert tested.notes["up"] == ""
    np.testing.assert_array_equal(tested.stored["up"].value(), untested.stored["up"].value())
