"""Root-mean-square normalisation (arXiv:1910.07467), with the residual addition before it where there is one."""

from __future__ import annotations

from typing import overload

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.rms_norm.tiles import Tiles

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
    _validate(x, scale, residual)
    out: jax.Array | tuple[jax.Array, jax.Array] = dispatch(
        "rms_norm", BACKENDS, backend, x, scale, residual, eps=eps, tiles=tiles
    )
    return out


def _validate(x: jax.Array, scale: jax.Array, residual: jax.Array | None) -> None:
    if x.ndim != 2 or scale.shape != x.shape[1:] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype}{x.shape} does not fit scale {scale.shape}; expected floats [T, D] and [D]")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {residual.shape} does not fit x {x.shape}; expected the same [T, D]")
    for name, array in (("scale", scale), ("residual", residual)):
        if array is not None and array.dtype != x.dtype:
            raise ValueError(f"{name} dtype={array.dtype} must be that of x, {x.dtype}; cast it")
