"""Root-mean-square normalisation (arXiv:1910.07467), with the residual addition before it where there is one."""

from __future__ import annotations

from typing import overload

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.rms_norm.call import RMSNormCall
from pallas_kernels.rms_norm.tiles import Tiles

__all__ = ["BACKENDS", "RMSNormCall", "rms_norm"]

BACKENDS = {
    "pallas_triton": "pallas_kernels.rms_norm.pallas_triton",
    "reference": "pallas_kernels.rms_norm.reference",
}
"""In order of preference; each refuses what it cannot do. XLA fuses the reference well: no other fallback is needed."""


@overload
def rms_norm(
    x: jax.Array, scale: jax.Array, *, eps: float, backend: str | None = None, tiles: Tiles | None = None
) -> jax.Array: ...


@overload
def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array,
    *,
    eps: float,
    backend: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float,
    backend: str | None = None,
    tiles: Tiles | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Norm each token of ``x``, or of ``x + residual``, in float32; cast back before the scale is applied.

    Args:
        x: [T, D] float.
        scale: [D], dtype of ``x``.
        residual: [T, D], dtype of ``x``; the sum is rounded to that dtype before it is normed.
        eps: added to the mean of the squares.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: for the Pallas backend; ``None`` takes the measured ones, else the heuristic's.

    Returns:
        The normed tokens [T, D]; with a residual, these and the sum [T, D]. Dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not fit together. NoBackendError: every backend refused.
    """
    call = RMSNormCall(x, scale, residual, eps)
    out: jax.Array | tuple[jax.Array, jax.Array] = dispatch(call, backend=backend, tiles=tiles)
    return out
