"""What CPUs serve adapters with: from token to token, and with each those behind it that have the same adapter.

An adapter is read once for every ``_few`` of its tokens that stand together: whoever lays tokens out puts them so.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.lora_matmul.call import LoRAMatmulCall
from pallas_kernels.target import Target

MIN_TOGETHER, MAX_TOGETHER = 2, 64
"""Tokens that are multiplied together."""

MAX_RANK = 64
"""R up to which the products of the fewest tokens are written out, rank by rank."""

State = tuple[jax.Array, jax.Array]
"""The next token, int32; and the result so far, float32 [T, N / period, period] with the segments' sum as period."""


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: LoRAMatmulCall) -> None:
    """Accepts every call."""


def run(call: LoRAMatmulCall, tiles: Any = None) -> jax.Array:
    """See ``pallas_kernels.lora_matmul.lora_matmul``; does not use ``ranks``, ignores ``tiles``."""
    x, a, b, adapter, segments = call.x, call.a, call.b, call.adapter, call.widths
    tokens, few = x.shape[0], _few(x.shape[0], call.candidates.shape[0])
    wide, places = x.astype(jnp.float32), jnp.arange(tokens, dtype=jnp.int32)
    rank, columns = b.shape[1], (b.shape[2] // sum(segments), sum(segments))

    def next_of(waiting: jax.Array) -> jax.Array:
        """The first token that waits; T if none does."""
        return jnp.argmax(jnp.append(waiting, True)).astype(jnp.int32)

    def serve(state: State) -> State:
        """The next tokens, as far as they have the adapter of the first of them."""
        token, out = state
        first, entry = jnp.minimum(token, tokens - few), adapter[token]
        own = (lax.dynamic_slice_in_dim(adapter, first, few) == entry)[:, None, None]
        mine = lax.dynamic_slice_in_dim(wide, first, few)
        down = jnp.dot(mine, a[entry].astype(jnp.float32), precision=lax.Precision.HIGHEST).reshape(few, -1, rank)
        for column, piece in _expanded(down, b, entry, segments):
            before = lax.dynamic_slice(out, (first, 0, column), piece.shape)
            out = lax.dynamic_update_slice(out, jnp.where(own, piece, before), (first, 0, column))
        served = (places < first + few) & (adapter == entry)
        return next_of((places > token) & (adapter >= 0) & ~served), out

    start = next_of(adapter >= 0), jnp.zeros((tokens, *columns), jnp.float32)
    return lax.while_loop(lambda state: state[0] < tokens, serve, start)[1].astype(x.dtype).reshape(tokens, -1)


def _few(tokens: int, adapters: int) -> int:
    """How many tokens are multiplied together: about as many as have the same adapter."""
    share = 1 << (-(-tokens // adapters) - 1).bit_length()
    return min(max(share, MIN_TOGETHER), MAX_TOGETHER, tokens)


def _expanded(
    down: jax.Array, b: jax.Array, entry: jax.Array, segments: tuple[int, ...]
) -> Iterator[tuple[int, jax.Array]]:
    """float32 ``down`` [t, M, R] times an entry of ``b`` → [t, N / period, columns], and the first of the columns."""
    (few, modules, rank), period = down.shape, sum(segments)
    if (
        few <= MIN_TOGETHER and rank <= MAX_RANK
    ):  # rows of b are read where they lie: a dot would have them copied first
        of_column, total = np.repeat(np.arange(modules), segments), jnp.zeros((), jnp.float32)
        for index in range(rank):
            factor = down[:, 0, index, None, None]
            for module in range(1, modules):
                factor = jnp.where(of_column == module, down[:, module, index, None, None], factor)
            total += factor * b[entry, index].astype(jnp.float32).reshape(-1, period)
        yield 0, total
        return
    own = b[entry].astype(jnp.float32).reshape(rank, -1, period)
    for module, end in enumerate(accumulate(segments)):
        begin = end - segments[module]
        yield begin, jnp.tensordot(down[:, module], own[:, :, begin:end], 1, precision=lax.Precision.HIGHEST)
