"""Low-rank updates of a matrix product, each token's by an adapter of its own: several LoRA adapters in one batch.

LoRA is arXiv:2106.09685; many adapters in one kernel are Punica's, arXiv:2310.18547, and S-LoRA's, arXiv:2311.03285.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.lora_matmul.tiles import Tiles

BACKENDS = {
    "pallas_triton": "pallas_kernels.lora_matmul.pallas_triton",
    "xla": "pallas_kernels.lora_matmul.xla",
    "reference": "pallas_kernels.lora_matmul.reference",
}
"""In order of preference; each refuses what it cannot do."""


def lora_matmul(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    adapter: jax.Array,
    candidates: jax.Array,
    ranks: jax.Array,
    *,
    segments: tuple[int, ...] | None = None,
    backend: str | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """``(x · a[i]) · b[i]`` for each token, where ``i`` is its ``adapter``; zeros for a token that has none.

    ``a`` and ``b`` are a bank of B adapters, which may be those of many layers: a call reads the entries that its
    tokens use, and no other. The map may be several modules M side by side, each with a product of its own: column n of
    module m is ``(x · a[i][:, m·R : m·R + R]) · b[i][:, n]``.

    Args:
        x: [T, K] float.
        a: [B, K, M·R], dtype of ``x``, module after module. The columns of each beyond an entry's rank are zero.
        b: [B, R, N], dtype of ``x``, with the adapter's scaling in it. Its rows beyond an entry's rank are zero.
        adapter: int32 [T], the entry of each token; negative: none.
        candidates: int32 [S], every entry that ``adapter`` may name, each once; negative ones are padding. Kernels are
            fastest where they are neighbours in the bank, in any order.
        ranks: int32 [B], how many of the R of each entry are in use, in the module that has most.
        segments: the widths of the M modules' columns in turn, which repeat along N; ``None``: one module.
        backend: a name of ``BACKENDS``; ``None`` takes the first that accepts the call.
        tiles: for the Pallas backend; ``None`` takes the measured ones, else the heuristic's.

    Returns:
        [T, N], dtype of ``x``; sums are float32.

    Raises:
        ValueError: shapes or dtypes that do not fit together. NoBackendError: every backend refused.
    """
    segments = b.shape[2:] if segments is None else segments
    _validate(x, a, b, adapter, candidates, ranks, segments)
    arrays = (x, a, b, adapter, candidates, ranks)
    out: jax.Array = dispatch("lora_matmul", BACKENDS, backend, *arrays, segments=segments, tiles=tiles)
    return out


def _validate(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    adapter: jax.Array,
    candidates: jax.Array,
    ranks: jax.Array,
    segments: tuple[int, ...],
) -> None:
    modules = len(segments)
    if x.ndim != 2 or a.ndim != 3 or b.ndim != 3 or a.shape != (b.shape[0], x.shape[1], modules * b.shape[1]):
        expected = f"expected [T, K], [B, K, M·R] and [B, R, N] of M={modules}"
        raise ValueError(f"x {x.shape}, a {a.shape} and b {b.shape} do not fit; {expected}")
    if min(segments, default=0) < 1 or b.shape[2] % sum(segments):
        raise ValueError(
            f"segments={segments} must repeat along N={b.shape[2]}; give the width of each module's columns"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.dtype == a.dtype == b.dtype:
        raise ValueError(f"x {x.dtype}, a {a.dtype} and b {b.dtype} must be floats of one dtype; cast them")
    for name, array, letter, shape in (
        ("adapter", adapter, "T", x.shape[:1]),
        ("candidates", candidates, "S", candidates.shape[:1]),
        ("ranks", ranks, "B", a.shape[:1]),
    ):
        if array.dtype != jnp.int32 or array.shape != shape or not shape:
            raise ValueError(
                f"{name} {array.dtype}{array.shape} does not fit x {x.shape}, a {a.shape}; int32 [{letter}]"
            )
