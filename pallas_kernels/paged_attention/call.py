"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax

from pallas_kernels.kv_pool import Pool, fits, stored
from pallas_kernels.score_options import ScoreOptions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedAttentionCall:
    """Causal attention of R rows of Q query tokens.

    Attributes:
        queries: [R, Q, N, H] float. Token i of row r has position ``first_positions[r] + i``.
        pool: [P, 2, K, S, H] float, keys at [:, 0], values at [:, 1]; or a ``QuantizedPool``.
        block_tables: int32 [R, M], physical blocks of the row's sequence. Entries beyond its context are not used.
        first_positions: int32 [R].
        lengths: int32 [R], real tokens of each row. The tokens after them are padding.
        scores: scale, window and other options of the scores.
    """

    OP: ClassVar = "paged_attention"

    queries: jax.Array
    pool: Pool
    block_tables: jax.Array
    first_positions: jax.Array
    lengths: jax.Array
    scores: ScoreOptions = field(kw_only=True)

    @property
    def kv_heads(self) -> int:
        """K."""
        return int(stored(self.pool).shape[2])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return int(self.queries.shape[2]) // self.kv_heads

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes that do not fit together, or an option out of its range."""
        rows, _, heads, size = self.queries.shape
        if not fits(self.pool, heads, size):
            shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", self.pool)
            expected = f"[P, 2, K, S, {size}], or a QuantizedPool of it"
            raise ValueError(f"pool={shapes} does not fit queries {self.queries.shape}; expected {expected}")
        per_row = (self.block_tables.shape[:1], self.first_positions.shape, self.lengths.shape)
        if set(per_row) != {(rows,)}:
            raise ValueError(
                f"block_tables {self.block_tables.shape}, first_positions {self.first_positions.shape} and "
                f"lengths {self.lengths.shape} must each have one entry for each of the {rows} rows of queries"
            )
        self.scores.validate(heads)
