"""What a step returns for the prompts that it computes: hidden states and log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdeploy.engine.checks import MAX_LOGPROBS

MAX_LOGITS_ROWS = 256
"""Maximum tokens whose logits exist at the same time."""

LogitsOf = Callable[[jax.Array, jax.Array | None], jax.Array]
"""Hidden states [t, D], and the adapter slot of each row or ``None`` → logits float32 [t, V]."""


class PromptRows(NamedTuple):
    """The S prompts of a step, and their T tokens."""

    sums: jax.Array
    """float32 [S, D]: sum of the hidden states of each prompt's tokens."""
    last: jax.Array
    """float32 [S, D]: hidden state of its last token."""
    logprobs: jax.Array | None = None
    """[T]: natural log-probability of the token after each; ``None`` if no prompt needs it."""
    top_tokens: jax.Array | None = None
    """[T, MAX_LOGPROBS]: the likeliest tokens in its place."""
    top_logprobs: jax.Array | None = None
    """[T, MAX_LOGPROBS]: their log-probabilities."""


def prompt_rows(
    hidden: jax.Array,
    prompt: jax.Array,
    real: jax.Array,
    last_token: jax.Array,
    next_token: jax.Array,
    logits: LogitsOf | None,
    adapter: jax.Array | None = None,
) -> PromptRows:
    """Return the outputs for T tokens of S prompts.

    Args:
        hidden: [T, D], normed.
        prompt: int32 [T], index of the prompt of each token.
        real: bool [T], False for padding.
        last_token: int32 [S], index of each prompt's last token.
        next_token: int32 [T], the token after each.
        logits: computes logits; ``None`` if no prompt needs log-probabilities.
        adapter: int32 [T], slot of each token's adapter, negative for none; ``None`` if no token has one.
    """
    wide = hidden.astype(jnp.float32)
    sums = jax.ops.segment_sum(wide * real.astype(jnp.float32)[:, None], prompt, last_token.shape[0])
    if logits is None:
        return PromptRows(sums, wide[last_token])
    return PromptRows(sums, wide[last_token], *_logprobs(hidden, next_token, adapter, logits))


def _logprobs(
    hidden: jax.Array, next_token: jax.Array, adapter: jax.Array | None, logits: LogitsOf
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities, likeliest tokens and their values, computed for equal parts of the tokens in turn."""

    def of_part(rows: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array, jax.Array]:
        states, tokens, slots = rows
        logprobs = jax.nn.log_softmax(logits(states, slots), axis=-1)
        values, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logprobs.shape[-1]))
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], ids, values

    count = next_token.shape[0]
    size = next(size for size in range(min(MAX_LOGITS_ROWS, count), 0, -1) if count % size == 0)
    slots = None if adapter is None else adapter.reshape(-1, size)
    parts = jax.lax.map(of_part, (hidden.reshape(-1, size, hidden.shape[1]), next_token.reshape(-1, size), slots))
    joined: tuple[jax.Array, jax.Array, jax.Array] = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
    return joined
