"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAMatmulCall:
    """Tokens, a bank of B adapters, and the adapter of each token.

    The bank may hold the adapters of many layers. A call reads only the entries that its tokens use. The map may be M
    modules next to each other, each with its product. Column n of module m is
    ``(x · a[i][:, m·R : m·R + R]) · b[i][:, n]``.

    Attributes:
        x: [T, K] float.
        a: [B, K, M·R], dtype of ``x``, module after module. The columns of each beyond an entry's rank are zero.
        b: [B, R, N], dtype of ``x``, with the adapter's scaling in it. Its rows beyond an entry's rank are zero.
        adapter: int32 [T], the entry of each token; negative for none.
        candidates: int32 [S], every entry that ``adapter`` may name, each once; negative ones are padding. Kernels are
            fastest if they are neighbours in the bank, in any order.
        ranks: int32 [B], how many of the R of each entry are in use, in the module with the highest rank.
        segments: the widths of the M modules' columns in turn, which repeat along N; ``None`` for one module.
    """

    OP: ClassVar = "lora_matmul"

    x: jax.Array
    a: jax.Array
    b: jax.Array
    adapter: jax.Array
    candidates: jax.Array
    ranks: jax.Array
    segments: tuple[int, ...] | None = field(default=None, kw_only=True, metadata={"static": True})

    @property
    def widths(self) -> tuple[int, ...]:
        """``segments``, or N for one module."""
        return self.b.shape[2:] if self.segments is None else self.segments

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes or dtypes that do not fit together."""
        x, a, b, modules = self.x, self.a, self.b, len(self.widths)
        if x.ndim != 2 or a.ndim != 3 or b.ndim != 3 or a.shape != (b.shape[0], x.shape[1], modules * b.shape[1]):
            expected = f"expected [T, K], [B, K, M·R] and [B, R, N] of M={modules}"
            raise ValueError(f"x {x.shape}, a {a.shape} and b {b.shape} do not fit; {expected}")
        if min(self.widths, default=0) < 1 or b.shape[2] % sum(self.widths):
            raise ValueError(
                f"segments={self.widths} must repeat along N={b.shape[2]}; give the width of each module's columns"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating) or not x.dtype == a.dtype == b.dtype:
            raise ValueError(f"x {x.dtype}, a {a.dtype} and b {b.dtype} must be floats of one dtype; cast them")
        for name, array, letter, shape in (
            ("adapter", self.adapter, "T", x.shape[:1]),
            ("candidates", self.candidates, "S", self.candidates.shape[:1]),
            ("ranks", self.ranks, "B", a.shape[:1]),
        ):
            if array.dtype != jnp.int32 or array.shape != shape or not shape:
                raise ValueError(
                    f"{name} {array.dtype}{array.shape} does not fit x {x.shape}, a {a.shape}; int32 [{letter}]"
                )
