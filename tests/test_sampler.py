"""Choosing tokens, against a plain statement of every rule in numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.engine.checks import MAX_LOGPROBS
from jaxdeploy.engine.device.sampler import CANDIDATES, Sampled, SamplingRows, _threshold, greedy, sample

Array = np.ndarray[Any, Any]

VOCAB, HISTORY, ROWS = 37, 12, 32
DRAWS = 4096
choose = jax.jit(sample)


def rows(count: int, vocab: int = VOCAB, **given: Any) -> SamplingRows:
    """Settings of ``count`` rows that change nothing, but for those ``given`` (one value, or one for each row)."""
    neutral: dict[str, Any] = {
        "temperature": np.float32(1),
        "top_k": np.int32(0),
        "top_p": np.float32(1),
        "min_p": np.float32(0),
        "repetition_penalty": np.float32(1),
        "presence_penalty": np.float32(0),
        "frequency_penalty": np.float32(0),
        "seed": np.uint32(0),
        "length": np.int32(1),
        "prompt_length": np.int32(1),
    }
    fields: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(given.pop(name, value), value.dtype), (count,))
        for name, value in neutral.items()
    }
    history = given.pop("history", np.zeros((count, HISTORY), np.int32))
    allowed = given.pop("allowed", np.ones((count, vocab), bool))
    assert not given
    fields |= {"history": history, "allowed": bit_mask(allowed)}
    fields |= {"biased": np.zeros((count, 1), np.int32), "bias": np.zeros((count, 1), np.float32)}
    return SamplingRows(**fields)


def bit_mask(allowed: Array) -> Array:
    """Booleans [B, V] as the words that the sampler takes."""
    words = np.zeros((allowed.shape[0], -(-allowed.shape[1] // 32)), np.uint32)
    for row, token in zip(*np.nonzero(allowed), strict=True):
        words[row, token // 32] |= np.uint32(1 << int(token) % 32)
    return words


def logits_of(seed: int, count: int = ROWS, vocab: int = VOCAB) -> Array:
    logits: Array = 2 * np.random.default_rng(seed).standard_normal((count, vocab), np.float32)
    return logits


limits = jax.jit(_threshold)
"""The smallest value that is kept of each row."""


def draw(logits: Array, settings: SamplingRows) -> Array:
    return np.asarray(choose(logits, settings).tokens)


def softmax(logits: Array) -> Array:
    weights: Array = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    return weights


def kept(logits: Array, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Array:
    """Probability of each token of one row after all filters, said in the plainest way."""
    probabilities = softmax(logits / temperature)
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    order = order[: top_k or None]
    total = sum(probabilities[token] for token in order)
    nucleus: list[int] = []
    reached = 0.0
    for token in order:
        if reached < top_p or not nucleus:
            nucleus.append(token)
        reached += probabilities[token] / total
    final = np.zeros(len(logits))
    for token in nucleus:
        if probabilities[token] >= min_p * probabilities[order[0]]:
            final[token] = probabilities[token]
    final /= final.sum()
    return final


def penalised(
    logits: Array, history: Array, prompt: int, length: int, repetition: float, presence: float, frequency: float
) -> Array:
    """Logits of one row after its penalties, token by token."""
    changed = logits.astype(np.float64).copy()
    output = history[prompt:length].tolist()
    for token in range(len(logits)):
        if token in history[:length].tolist():
            changed[token] = changed[token] / repetition if changed[token] > 0 else changed[token] * repetition
        changed[token] -= frequency * output.count(token) + presence * (token in output)
    return changed


def chi_square(counts: Array, probabilities: Array) -> float:
    """Pearson's statistic over the tokens that can come."""
    expected = probabilities[probabilities > 0] * counts.sum()
    return float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())


DISTRIBUTION = np.log(np.array([0.3, 0.25, 0.16, 0.12, 0.08, 0.05, 0.03, 0.01], np.float32))
CHI_SQUARE_7 = 24.3
"""What Pearson's statistic of 8 classes exceeds once in a thousand; fewer classes exceed it more rarely."""


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.72},  # one more token than 0.7
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8, "min_p": 0.5},
        {"top_k": 100},
        {"top_p": 1e-6},
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["seed", "length"])
def test_the_distribution(setting: dict[str, Any], varied: str) -> None:
    """Neither the draws of many seeds nor those of one seed at many positions depart from what is asked for."""
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **setting}
    expected = kept(DISTRIBUTION, **full)
    logits = np.tile(DISTRIBUTION, (DRAWS, 1))
    numbers = {"seed": np.zeros(DRAWS) + 7, "length": np.ones(DRAWS), varied: np.arange(DRAWS)}
    settings = rows(DRAWS, 8, history=np.zeros((DRAWS, 1), np.int32), **full, **numbers)
    counts = np.bincount(draw(logits, settings), minlength=8)
    assert not counts[expected == 0].any()
    assert counts[expected > 0].all()
    assert chi_square(counts, expected) < CHI_SQUARE_7


def test_the_check_of_the_distribution_can_fail() -> None:
    settings = rows(DRAWS, 8, history=np.zeros((DRAWS, 1), np.int32), seed=np.arange(DRAWS), temperature=1.3)
    counts = np.bincount(draw(np.tile(DISTRIBUTION, (DRAWS, 1)), settings), minlength=8)
    assert chi_square(counts, softmax(DISTRIBUTION)) > CHI_SQUARE_7


SETTINGS = st.tuples(
    st.floats(0.25, 3.0, width=32), st.integers(2, 50), st.floats(0.0, 1.0, width=32), st.floats(0.0, 1.0, width=32)
)


@settings(max_examples=15, deadline=None)
@given(values=st.lists(SETTINGS, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 1000))
def test_only_kept_tokens_are_drawn(values: list[tuple[float, int, float, float]], seed: int) -> None:
    logits = logits_of(seed)
    names = ("temperature", "top_k", "top_p", "min_p")
    columns: dict[str, Any] = dict(zip(names, (list(column) for column in zip(*values, strict=True)), strict=True))
    tokens = draw(logits, rows(ROWS, **columns, seed=np.arange(ROWS)))
    for row, value in enumerate(values):
        limits = dict(zip(names, value, strict=True))
        # A hair's breadth more, for probabilities that stand at a limit up to rounding.
        limits["top_p"], limits["min_p"] = limits["top_p"] + 1e-5, limits["min_p"] * (1 - 1e-5)
        assert kept(logits[row], **limits)[tokens[row]] > 0  # type: ignore[arg-type]


LARGE = 3 * CANDIDATES
MANY: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_k": CANDIDATES},
    {"top_k": CANDIDATES + 1},
    {"top_k": LARGE},
    {"top_k": CANDIDATES + 50, "top_p": 0.2},
    {"top_k": LARGE - 1, "min_p": 0.5},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"min_p": 0.9},
    {"min_p": 1e-6},
    {"top_p": 0.9999, "min_p": 1e-6},
    {},
]
"""Some are settled by the likeliest tokens, some are not."""


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_large_vocabulary(spread: float) -> None:
    """What is kept, row by row, whether or not another row has all tokens sorted."""
    logits = spread * logits_of(4, len(MANY), LARGE)
    complete = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **setting} for setting in MANY]
    columns: dict[str, Any] = {name: [setting[name] for setting in complete] for name in complete[0]}
    history = np.zeros((len(MANY), 1), np.int32)
    together = limits(logits, rows(len(MANY), LARGE, history=history, **columns))
    for row, setting in enumerate(complete):
        alone = limits(logits[row : row + 1], rows(1, LARGE, history=history[:1], **setting))[0]
        assert together[row] == alone
        differ = (logits[row] >= alone) != (kept(logits[row], **setting) > 0)
        assert softmax(logits[row])[differ].sum() < 1e-5, "more than rounding at a limit"


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 5.0, "top_k": 1}], ids=str)
def test_greedy_takes_the_likeliest(setting: dict[str, Any]) -> None:
    logits = logits_of(1)
    expected = logits.argmax(axis=-1).tolist()
    assert draw(logits, rows(ROWS, **setting, seed=np.arange(ROWS))).tolist() == expected
    assert greedy(jnp.asarray(logits)).tokens.tolist() == expected


def penalty_case(seed: int) -> tuple[Array, dict[str, Any]]:
    random, logits = np.random.default_rng(seed), logits_of(seed) - 1.0
    length = random.integers(2, HISTORY + 1, ROWS)
    case = {
        "history": random.integers(0, VOCAB, (ROWS, HISTORY), np.int32),
        "length": length,
        "prompt_length": random.integers(1, length + 1),
        "repetition_penalty": random.choice([1.0, 1.3, 0.8], ROWS),
        "presence_penalty": random.choice([0.0, 0.9, -0.9], ROWS),
        "frequency_penalty": random.choice([0.0, 0.7, -0.7], ROWS),
    }
    case["history"][:, ::3] = logits.argmax(axis=-1)[:, None]  # the likeliest comes several times
    return logits, case


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize("names", [(name,) for name in PENALTIES] + [PENALTIES], ids="+".join)
def test_penalties_under_greedy(names: tuple[str, ...]) -> None:
    """What counts as seen, and how often, decides which token is the likeliest."""
    changed = 0
    for seed in range(8):
        logits, case = penalty_case(seed)
        case |= {name: np.full(ROWS, name == PENALTIES[0], float) for name in PENALTIES if name not in names}
        tokens = draw(logits, rows(ROWS, temperature=0.0, **case))
        for row in range(ROWS):
            numbers = [float(case[name][row]) for name in PENALTIES]
            history, prompt, length = case["history"][row], case["prompt_length"][row], case["length"][row]
            assert tokens[row] == penalised(logits[row], history, prompt, length, *numbers).argmax()
        changed += int((tokens != logits.argmax(axis=-1)).sum())
    assert changed > 8, "the penalties were too weak to show anything"


def test_penalties_shift_the_distribution() -> None:
    history = np.tile(np.array([0, 1, 1, 2], np.int32), (DRAWS, 1))
    expected = softmax(penalised(DISTRIBUTION, history[0], 1, 3, 1.2, 0.4, 0.3))
    numbers = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    settings = rows(DRAWS, 8, history=history, prompt_length=1, length=3, seed=np.arange(DRAWS), **numbers)
    counts = np.bincount(draw(np.tile(DISTRIBUTION, (DRAWS, 1)), settings), minlength=8)
    assert chi_square(counts, expected) < CHI_SQUARE_7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_never_come(temperature: float) -> None:
    logits = logits_of(3)
    allowed = np.random.default_rng(3).random((ROWS, VOCAB)) < 0.2
    allowed[:, 36] |= ~allowed.any(axis=-1)
    tokens = draw(logits, rows(ROWS, temperature=temperature, allowed=allowed, seed=np.arange(ROWS)))
    assert allowed[np.arange(ROWS), tokens].all()
    if temperature == 0.0:
        assert tokens.tolist() == np.where(allowed, logits, -np.inf).argmax(axis=-1).tolist()


def test_forbidden_tokens_do_not_count_among_the_top_k() -> None:
    logits = np.tile(np.arange(VOCAB, dtype=np.float32), (ROWS, 1))
    allowed = np.ones((ROWS, VOCAB), bool)
    allowed[:, 35:] = False
    tokens = draw(logits / 10, rows(ROWS, top_k=2, allowed=allowed, seed=np.arange(ROWS)))
    assert set(tokens.tolist()) == {33, 34}


def test_logprobs_are_the_models_own() -> None:
    logits, case = penalty_case(5)
    result: Sampled = choose(logits, rows(ROWS, **case, temperature=0.3, top_k=4, seed=np.arange(ROWS)))
    expected = np.log(np.stack([softmax(row) for row in logits]))
    tolerance = 8 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert result.logprobs is not None
    assert result.top_tokens is not None
    assert result.top_logprobs is not None
    chosen = expected[np.arange(ROWS), np.asarray(result.tokens)]
    np.testing.assert_allclose(result.logprobs, chosen, rtol=0, atol=tolerance)
    best = np.argsort(-expected, axis=-1)[:, :MAX_LOGPROBS]
    assert np.asarray(result.top_tokens).tolist() == best.tolist()
    np.testing.assert_allclose(result.top_logprobs, -np.sort(-expected)[:, :MAX_LOGPROBS], rtol=0, atol=tolerance)


def test_a_small_vocabulary_has_fewer_alternatives() -> None:
    result = choose(np.tile(DISTRIBUTION, (2, 1)), rows(2, 8))
    assert result.top_tokens is not None
    assert result.top_tokens.shape == (2, 8)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, case = penalty_case(9)
    case |= {"seed": np.arange(ROWS) % 5, "top_p": np.linspace(0.1, 1, ROWS), "temperature": np.full(ROWS, 1.3)}
    together = draw(logits, rows(ROWS, **case))
    backwards = draw(logits[::-1], rows(ROWS, **{name: value[::-1] for name, value in case.items()}))
    assert backwards[::-1].tolist() == together.tolist()
    alone = [draw(logits[i : i + 1], rows(1, **{n: v[i : i + 1] for n, v in case.items()}))[0] for i in range(ROWS)]
    assert alone == together.tolist()


def test_seeds_and_positions_differ() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    by_seed, by_length = rows(ROWS, seed=np.arange(ROWS)), rows(ROWS, length=np.arange(ROWS))
    assert min(len(set(draw(logits, varied).tolist())) for varied in (by_seed, by_length)) > ROWS // 3
    assert len(set(draw(logits, rows(ROWS, seed=2**32 - 1)).tolist())) == 1
