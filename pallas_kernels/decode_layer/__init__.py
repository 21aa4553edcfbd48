"""One transformer layer for one new token of every sequence: the decode step's inner part, in seven launches."""

from __future__ import annotations

import jax

from pallas_kernels.decode_layer.call import DecodeLayerCall, padded_rows
from pallas_kernels.decode_layer.tiles import Tiles
from pallas_kernels.decode_layer.weights import LayerWeights
from pallas_kernels.dispatch import dispatch
from pallas_kernels.kv_pool import Pool
from pallas_kernels.score_options import ScoreOptions

__all__ = ["BACKENDS", "DecodeLayerCall", "LayerWeights", "ScoreOptions", "Tiles", "decode_layer", "padded_rows"]

BACKENDS = {
    "pallas_triton": "pallas_kernels.decode_layer.pallas_triton",
    "reference": "pallas_kernels.decode_layer.reference",
}
"""In order of preference; each module refuses what it cannot do."""


def decode_layer(
    call: DecodeLayerCall, *, backend: str | None = None, tiles: Tiles | None = None
) -> tuple[jax.Array, jax.Array, Pool]:
    """Attention and gated MLP of a pre-norm layer with rotary positions, over a paged KV cache.

    Args:
        call: operands and options.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: for ``pallas_triton``; ``None`` takes measured ones, else the heuristic's.

    Returns:
        (x, normed, pool) for the next layer.

    Raises:
        ValueError: shapes that do not fit together.
        NoBackendError: every backend refused.
    """
    result: tuple[jax.Array, jax.Array, Pool] = dispatch(call, backend=backend, tiles=tiles)
    return result
