"""What quantising costs trained models, on text that was kept from it: the figures that the methods are judged by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from quant_quality import CASES, DEMO, STORIES, Measured, Text, demo_text, measure, stories_text

from jaxdeploy.compress.evaluate import Tally, compare, compare_outputs, outputs, perplexity, token_losses
from jaxdeploy.errors import ConfigError
from tests.tiny_models import dense_decoder, prompt

MODELS: dict[str, tuple[Path, Callable[[int, int], Text]]] = {
    "demo": (DEMO, demo_text),
    "stories260K": (STORIES, stories_text),
}
CALIB = 32
SOME, MANY = 64, 512
"""Sequences to measure with. The demo is so sure of its replies that AWQ and rounding are told apart by many only."""

on_each_model = pytest.mark.parametrize("model", MODELS)
methods_and_models = pytest.mark.parametrize(
    ("method", "model", "rows"),
    [
        ("awq", "stories260K", SOME),
        ("gptq", "stories260K", SOME),
        ("awq", "demo", MANY),
        ("gptq", "demo", MANY),
    ],
)


@functools.cache
def text(model: str, rows: int) -> Text:
    return MODELS[model][1](CALIB, rows)


@functools.cache
def measured(model: str, case: str, rows: int) -> Measured:
    return measure(MODELS[model][0], text(model, rows), **CASES[case])


@pytest.fixture(autouse=True)
def _models_are_there(request: pytest.FixtureRequest) -> None:
    if "stories260K" in request.node.name:
        request.getfixturevalue("shared")


def ids_and_marks() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    ids = np.array([prompt(48, seed) for seed in range(3)], np.int32)
    return ids, np.random.default_rng(0).random(ids.shape) < 0.3


@pytest.mark.slow
@on_each_model
def test_enough_is_held_out_and_none_of_it_was_calibrated_on(model: str) -> None:
    made = text(model, SOME)
    assert made.scored[:, 1:].sum() > 5000
    assert not {tuple(row) for row in made.calib} & {tuple(row) for row in made.held_out}


@pytest.mark.slow
@methods_and_models
def test_four_bits_are_no_worse_than_rounding_to_nearest(method: str, model: str, rows: int) -> None:
    """In perplexity as far as so much text can tell, and closer to float for certain."""
    ours, rtn = (measured(model, f"{name} W4", rows) for name in (method, "rtn"))
    more, error = ours.nll_above(rtn)
    assert more <= 2 * error
    assert ours.quality.kl < 0.9 * rtn.quality.kl


@pytest.mark.slow
@methods_and_models
def test_three_bits_are_clearly_better_than_rounding_to_nearest(method: str, model: str, rows: int) -> None:
    """Rounding to nearest loses there, beyond any doubt; they lose two thirds of it at most."""
    ours, rtn = (measured(model, f"{name} W3", rows) for name in (method, "rtn"))
    more, error = ours.nll_above(rtn)
    assert more < -3 * error
    assert ours.nll_above()[0] < 2 / 3 * rtn.nll_above()[0]
    assert ours.quality.kl < 2 / 3 * rtn.quality.kl


@pytest.mark.slow
@on_each_model
@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_has_worse_weights_and_better_outputs(model: str, bits: int) -> None:
    """It moves weights away from where they were, so that errors cancel: in each matrix."""
    ours, rtn = (measured(model, f"{method} W{bits}", SOME).linears for method in ("gptq", "rtn"))
    for mine, its in zip(ours, rtn, strict=True):
        assert (mine.layer, mine.linear) == (its.layer, its.linear)
        assert mine.weight_error > its.weight_error
        assert mine.output_error < its.output_error


@pytest.mark.slow
@on_each_model
def test_weights_and_activations_in_int8_are_within_one_percent(model: str) -> None:
    quality = measured(model, "smooth_quant W8A8", SOME).quality
    assert quality.ppl_after == pytest.approx(quality.ppl_before, rel=0.01)
    assert quality.kl > 0


@pytest.mark.slow
@on_each_model
def test_an_int8_cache_is_within_half_a_percent_and_int4_says_what_it_costs(model: str) -> None:
    eight, four = (measured(model, f"KV int{bits}", SOME).quality for bits in (8, 4))
    assert eight.ppl_after == pytest.approx(eight.ppl_before, rel=0.005)
    assert 0 < 30 * eight.kl < four.kl < np.inf


@pytest.mark.slow
def test_what_fits_no_group_stays_float() -> None:
    """The MLP of stories260K is 172 wide; its other matrices get the largest group that divides 64."""
    made = measured("stories260K", "gptq W4", SOME)
    assert set(made.kept_float) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert {linear.group_size for linear in made.linears} == {64}


def test_differences_are_taken_sequence_by_sequence() -> None:
    """Two sequences of 10 tokens, one hard and one easy, that both cost 1 nat more."""
    easy, hard = Tally(5.0, 6.0, 0.1, 9, 10), Tally(500.0, 501.0, 0.1, 9, 10)
    above, error = Measured((easy, hard), (), {}).nll_above()
    assert above == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)
    uneven = Measured((easy, Tally(500.0, 503.0, 0.1, 9, 10)), (), {})
    assert uneven.nll_above() == pytest.approx((0.2, 2**0.5 / 20))
    assert uneven.nll_above(uneven) == (0, 0)


def test_only_tokens_that_are_marked_count() -> None:
    decoder, (ids, marks) = dense_decoder(), ids_and_marks()
    losses = np.asarray(token_losses(decoder(jnp.asarray(ids)), ids))
    found = perplexity(decoder, ids, scored=marks)
    assert found.tokens == marks[:, 1:].sum() < losses.size
    assert found.nll == pytest.approx(losses[marks[:, 1:]].mean(), rel=1e-5)
    assert found.nll != pytest.approx(losses[marks[:, :-1]].mean(), rel=1e-3), "a mark is about the token it is on"
    assert perplexity(decoder, ids, scored=np.ones_like(marks)) == perplexity(decoder, ids)


def test_comparisons_count_marked_tokens_only() -> None:
    decoder, (ids, marks) = dense_decoder(), ids_and_marks()
    before, after = (outputs(decoder, ids, kv_bits=bits) for bits in (None, 4))
    parts = [compare_outputs(before, after, ids, chosen) for chosen in (marks, ~marks)]
    whole, joined = compare_outputs(before, after, ids), parts[0] + parts[1]
    assert (joined.tokens, joined.same) == (whole.tokens, whole.same)
    assert (joined.kl, joined.nll_after) == pytest.approx((whole.kl, whole.nll_after), rel=1e-5)
    assert parts[0].nll_before / parts[0].tokens == pytest.approx(perplexity(decoder, ids, scored=marks).nll, rel=1e-5)
    p, q = (np.stack([side.head.logits(jnp.asarray(x)) for x in side.hidden]) for side in (before, after))
    assert compare(p, q, ids, marks).kl == pytest.approx(parts[0].kl, rel=1e-4)


def test_marks_on_first_tokens_leave_nothing_to_predict() -> None:
    ids, _ = ids_and_marks()
    with pytest.raises(ConfigError, match="scored leaves no token to predict"):
        perplexity(dense_decoder(), ids, scored=np.arange(ids.shape[1]) == np.zeros((3, 1)))
