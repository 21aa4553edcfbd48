"""Attention over keys and values that live in the blocks of a pool.

A call is a set of rows. A row is Q consecutive query tokens of one sequence, together with that sequence's block
table: Q is 1 for a decoding sequence, and a chunk of a prompt is cut into rows of more tokens. One op serves both.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.score_options import ScoreOptions

__all__ = ["BACKENDS", "PagedAttentionCall", "ScoreOptions", "paged_attention"]

BACKENDS = {
    "pallas_mosaic_gpu": "pallas_kernels.paged_attention.pallas_mosaic_gpu",
    "pallas_triton": "pallas_kernels.paged_attention.pallas_triton",
    "reference": "pallas_kernels.paged_attention.reference",
}
"""In order of preference; each module refuses what it cannot do."""


def paged_attention(call: PagedAttentionCall, *, backend: str | None = None, tiles: Any = None) -> jax.Array:
    """Return the attention of every query token, [R, Q, N, H] in the dtype of the queries.

    Tokens beyond ``call.lengths`` get unspecified finite values.

    Args:
        call: operands and options.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: how a Pallas backend divides the call, ``Tiles`` for Triton; ``None`` takes the measured ones, else the
            heuristic's.

    Raises:
        ValueError: shapes that do not fit together, or an option out of its range.
        NoBackendError: every backend refused.
    """
    out: jax.Array = dispatch(call, backend=backend, tiles=tiles)
    return out
