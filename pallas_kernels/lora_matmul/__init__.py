"""Low-rank updates of a matrix product, each token's by an adapter of its own: several LoRA adapters in one batch.

LoRA is arXiv:2106.09685; many adapters in one kernel are Punica's, arXiv:2310.18547, and S-LoRA's, arXiv:2311.03285.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.lora_matmul.call import LoRAMatmulCall
from pallas_kernels.lora_matmul.tiles import Tiles

__all__ = ["BACKENDS", "LoRAMatmulCall", "lora_matmul"]

BACKENDS = {
    "pallas_triton": "pallas_kernels.lora_matmul.pallas_triton",
    "xla": "pallas_kernels.lora_matmul.xla",
    "reference": "pallas_kernels.lora_matmul.reference",
}
"""In order of preference; each refuses what it cannot do."""


def lora_matmul(call: LoRAMatmulCall, *, backend: str | None = None, tiles: Tiles | None = None) -> jax.Array:
    """``(x · a[i]) · b[i]`` for each token, with ``i`` its ``adapter``; zeros for a token without one.

    Args:
        call: operands and options.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: for the Pallas backend; ``None`` takes the measured ones, else the heuristic's.

    Returns:
        [T, N], dtype of ``x``; sums are float32.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        NoBackendError: every backend refused.
    """
    out: jax.Array = dispatch(call, backend=backend, tiles=tiles)
    return out
