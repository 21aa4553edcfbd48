"""Product of 16-bit activations with 4-bit weights that have a scale and a zero point for each group of rows.

The weight comes packed for the kernels; ``packing`` makes it from plain integers, or from what AWQ and GPTQ store. M, K
and N are the letters of a matrix product here: rows of activations, inputs, outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch

BACKENDS = {
    "pallas_mosaic_gpu": "pallas_kernels.w4a16_matmul.pallas_mosaic_gpu",
    "pallas_triton": "pallas_kernels.w4a16_matmul.pallas_triton",
    "xla": "pallas_kernels.w4a16_matmul.xla",
    "reference": "pallas_kernels.w4a16_matmul.reference",
}
"""In order of preference; each refuses what it cannot do."""


def w4a16_matmul(
    x: jax.Array,
    packed: jax.Array,
    bias: jax.Array | None = None,
    *,
    backend: str | None = None,
    tiles: Any = None,
) -> jax.Array:
    """``x · weight + bias``, summed in float32; the weight is ``(q - zero) · scale``.

    Args:
        x: [M, K] bfloat16 or float16 (float32 for ``xla`` and ``reference``).
        packed: int32 [K / 128, 16 + 128 / g, N], the weight [K, N] in groups of g = 32, 64 or 128 rows. In each chunk
            of 128 rows, nibble j of word [r, n], r < 16, is q of row 16·j + r. Row 16 + i is its group i: the float16
            bits of the scale in the low half, the zero point 0…16 in the high half.
        bias: [N], dtype of ``x``.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: how a Pallas backend cuts up the call, ``Tiles`` for Triton; ``None`` takes the measured ones, else the
            heuristic's. A backend refuses those of another.

    Returns:
        [M, N], dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not fit together. NoBackendError: every backend refused.
    """
    _validate(x, packed, bias)
    out: jax.Array = dispatch("w4a16_matmul", BACKENDS, backend, x, packed, bias, tiles=tiles)
    return out


def _validate(x: jax.Array, packed: jax.Array, bias: jax.Array | None) -> None:
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x {x.dtype}{x.shape} must be [M, K] in bfloat16, float16 or float32; reshape or cast it")
    if packed.ndim != 3 or packed.dtype != jnp.int32 or packed.shape[1] not in (17, 18, 20):
        raise ValueError(
            f"packed {packed.dtype}{packed.shape} must be int32 [K / 128, 16 + 128 / g, N] with g of 32, 64 or 128; "
            "make it with pallas_kernels.w4a16_matmul.packing"
        )
    if x.shape[1] != 128 * packed.shape[0]:
        raise ValueError(f"x {x.shape} does not fit packed {packed.shape}; K must be 128 times its first dimension")
    if bias is not None and (bias.shape != packed.shape[2:] or bias.dtype != x.dtype):
        raise ValueError(f"bias {bias.dtype}{bias.shape} must be {x.dtype}{packed.shape[2:]}: [N], dtype of x")
