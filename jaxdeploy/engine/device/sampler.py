"""Choosing the next token on the device, each row by its own settings.

Order: penalties, biases, forbidden tokens, temperature, top-k, top-p, min-p, then one draw with noise that depends only
on the row's seed and position, so a request gets the same tokens whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeploy.engine.checks import MAX_LOGPROBS

NOT_FINITE = -1
"""In place of a token: a logit of the row is NaN or plus infinity."""

CANDIDATES = 256
"""Likeliest tokens among which nearly every draw takes place."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """Settings of B rows, each array [B]; see ``jaxdeploy.messages.SamplingParams`` for their meaning.

    ``history`` int32 [B, L] are the row's tokens, of which ``length`` are known and ``prompt_length`` are prompt.
    ``allowed`` uint32 [B, ceil(V / 32)] has bit ``t % 32`` of word ``t // 32`` set where token t may be chosen.
    ``bias`` float32 [B, any] is added to the logits of ``biased`` int32 [B, any].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array
    history: jax.Array
    length: jax.Array
    prompt_length: jax.Array
    allowed: jax.Array
    biased: jax.Array
    bias: jax.Array


class Sampled(NamedTuple):
    """Chosen tokens int32 [B]; their log-probabilities [B] and the likeliest tokens' ids and values [B, MAX_LOGPROBS].

    A row whose logits are not finite has no token but ``NOT_FINITE``.
    Log-probabilities are the model's own, before penalties and temperature; ``None`` from ``greedy``.
    """

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def greedy(logits: jax.Array) -> Sampled:
    """The likeliest token of each row of ``logits`` float32 [B, V]."""
    return Sampled(_argmax(logits, logits))


def sample(logits: jax.Array, rows: SamplingRows) -> Sampled:
    """One token for each row of ``logits`` float32 [B, V], with log-probabilities."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    row = jnp.arange(logits.shape[0])[:, None]
    biased = _penalise(logits, rows).at[row, rows.biased].add(rows.bias)
    adjusted = jnp.where(_allowed_tokens(rows.allowed, logits.shape[-1]), biased, -jnp.inf)
    likeliest = _argmax(adjusted, logits)
    drawn = _argmax(_with_noise(adjusted, rows), logits)
    tokens = jnp.where(_is_greedy(rows), likeliest, drawn)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    return Sampled(tokens, chosen, top_tokens, top_logprobs)


def _penalise(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Repetition (CTRL, arXiv:1909.05858) on prompt and output, presence and frequency (OpenAI) on output alone."""
    batch, vocab = logits.shape
    positions = jnp.arange(rows.history.shape[1], dtype=jnp.int32)
    known = positions < rows.length[:, None]
    output = known & (positions >= rows.prompt_length[:, None])
    row = jnp.arange(batch)[:, None]
    zeros = jnp.zeros((batch, vocab), jnp.int32)
    seen = zeros.at[row, rows.history].add(known.astype(jnp.int32)) > 0
    count = zeros.at[row, rows.history].add(output.astype(jnp.int32))
    repetition = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    frequency = rows.frequency_penalty[:, None] * count.astype(logits.dtype)
    presence = rows.presence_penalty[:, None] * (count > 0).astype(logits.dtype)
    return logits - frequency - presence


def _allowed_tokens(words: jax.Array, vocab: int) -> jax.Array:
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    allowed: jax.Array = bits.reshape(words.shape[0], -1)[:, :vocab].astype(bool)
    return allowed


def _argmax(scores: jax.Array, logits: jax.Array) -> jax.Array:
    """The index int32 [B] of the largest of ``scores`` [B, V], the first of equal ones; or ``NOT_FINITE``.

    A logit that is not finite counts as the largest score at the index ``NOT_FINITE``: the reduction finds both without
    another pass or launch.
    """
    finite = logits < jnp.inf  # false for NaN
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)

    def larger(one: _Place, other: _Place) -> _Place:
        (value, place), (other_value, other_place) = one, other
        first = (value > other_value) | ((value == other_value) & (place < other_place))
        return jnp.where(first, value, other_value), jnp.where(first, place, other_place)

    operands = jnp.where(finite, scores, jnp.inf), jnp.where(finite, places, NOT_FINITE)
    nothing = np.array(-np.inf, scores.dtype), np.int32(0)
    index: jax.Array = jax.lax.reduce(operands, nothing, larger, (scores.ndim - 1,))[1]
    return index


_Place = tuple[jax.Array, jax.Array]
"""A score and its index."""


def _with_noise(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """The tokens that top-k, top-p and min-p leave, with Gumbel noise: the largest is a sample."""
    temperature = jnp.where(rows.temperature > 0.0, rows.temperature, 1.0)
    scaled = logits / temperature[:, None]
    kept = jnp.where(scaled >= _threshold(scaled, rows)[:, None], scaled, -jnp.inf)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(rows.seed, rows.length)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[-1],), jnp.float32))(keys)
    noisy: jax.Array = kept + noise
    return noisy


def _threshold(scaled: jax.Array, rows: SamplingRows) -> jax.Array:
    """The smallest kept value [B] of ``scaled`` [B, V].

    The largest values settle it for nearly all rows; only where they do not, all are sorted, which takes far longer.
    """
    total = jax.nn.logsumexp(scaled, axis=-1)
    likeliest = jax.lax.top_k(scaled, min(CANDIDATES, scaled.shape[-1]))[0]
    threshold, settled = _limit(likeliest, total, rows, scaled.shape[-1])

    def look_at_all() -> jax.Array:
        every, _ = _limit(-jnp.sort(-scaled, axis=-1), total, rows, scaled.shape[-1])
        return jnp.where(settled, threshold, every)

    if scaled.shape[-1] <= CANDIDATES:
        return threshold
    found: jax.Array = jax.lax.cond(jnp.all(settled | _is_greedy(rows)), lambda: threshold, look_at_all)
    return found


def _limit(ordered: jax.Array, total: jax.Array, rows: SamplingRows, vocab: int) -> tuple[jax.Array, jax.Array]:
    """The smallest kept value [B], if the n largest of V values, ``ordered`` [B, n], settle it; and whether they do.

    ``total`` [B] is the logarithm of the sum of the exponentials of all.
    """
    count = ordered.shape[-1]
    rank = jnp.arange(count, dtype=jnp.int32)
    top_k = jnp.where((rows.top_k > 0) & (rows.top_k < vocab), rows.top_k, vocab)
    among = rank < top_k[:, None]
    candidates = jnp.where(among, ordered, -jnp.inf)
    norm = jnp.where(top_k < vocab, jax.nn.logsumexp(candidates, axis=-1), total)
    probabilities = jnp.exp(candidates - norm[:, None])
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = among & (before < rows.top_p[:, None])
    keep &= probabilities >= rows.min_p[:, None] * probabilities[:, :1]
    last = jnp.maximum(jnp.sum(keep, axis=-1) - 1, 0)
    threshold = jnp.take_along_axis(ordered, last[:, None], axis=-1)[:, 0]
    takes_all = (top_k == vocab) & (rows.top_p >= 1.0) & (rows.min_p <= 0.0)
    settled = (top_k <= count) | ((top_k == vocab) & ~keep[:, -1])
    return jnp.where(takes_all, -jnp.inf, threshold), settled | takes_all


def _is_greedy(rows: SamplingRows) -> jax.Array:
    return (rows.temperature == 0.0) | (rows.top_k == 1)
