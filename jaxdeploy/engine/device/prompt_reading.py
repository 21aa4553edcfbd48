"""What a step tells of the prompts that it computes: their hidden states, and how likely each of their tokens was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdeploy.engine.checks import MAX_LOGPROBS

TOGETHER = 256
"""Most tokens whose logits exist at a time."""


class PromptRows(NamedTuple):
    """Of each of S prompts in a step: the sum of the hidden states of its tokens there, and the last, float32 [S, D].

    Of each of their T tokens: the natural log-probability [T] of the one behind it, and the likeliest ids and values
    [T, MAX_LOGPROBS] in its place, where any of the prompts wants to know.
    """

    sums: jax.Array
    last: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def read(
    hidden: jax.Array,
    prompt: jax.Array,
    real: jax.Array,
    last_token: jax.Array,
    next_token: jax.Array,
    logits: Any,
    adapter: jax.Array | None = None,
) -> PromptRows:
    """Read T tokens of S prompts.

    Args:
        hidden: [T, D], normed.
        prompt: int32 [T], which of the S prompts each belongs to.
        real: bool [T], False for padding.
        last_token: int32 [S], the last of each prompt's tokens here.
        next_token: int32 [T], the token behind each.
        logits: [t, D] and the ``adapter`` of each → float32 [t, V]; ``None`` where no log-probabilities are wanted.
        adapter: int32 [T], the slot of each token's adapter, negative for none; ``None`` where no token has any.
    """
    wide = hidden.astype(jnp.float32)
    sums = jax.ops.segment_sum(wide * real.astype(jnp.float32)[:, None], prompt, last_token.shape[0])
    if logits is None:
        return PromptRows(sums, wide[last_token])
    return PromptRows(sums, wide[last_token], *_scores(hidden, next_token, adapter, logits))


def _scores(
    hidden: jax.Array,
    next_token: jax.Array,
    adapter: jax.Array | None,
    logits: Callable[[jax.Array, jax.Array | None], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def some(rows: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array, jax.Array]:
        states, tokens, slots = rows
        logprobs = jax.nn.log_softmax(logits(states, slots), axis=-1)
        values, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logprobs.shape[-1]))
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], ids, values

    tokens = next_token.shape[0]
    size = next(size for size in range(min(TOGETHER, tokens), 0, -1) if tokens % size == 0)
    slots = None if adapter is None else adapter.reshape(-1, size)
    scores = jax.lax.map(some, (hidden.reshape(-1, size, hidden.shape[1]), next_token.reshape(-1, size), slots))
    joined: tuple[jax.Array, jax.Array, jax.Array] = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scores)
    return joined
