"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax

from pallas_kernels.decode_layer.weights import LayerWeights, weight_shape
from pallas_kernels.kv_pool import Pool, stored
from pallas_kernels.score_options import ScoreOptions


@dataclass(frozen=True)
class Heads:
    """N query heads over K KV heads of H elements each."""

    queries: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.queries // self.kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeLayerCall:
    """One transformer layer for one new token of each of B sequences.

    The activations of a step stay padded to ``padded_rows(B)`` rows from the first layer to the last. Rows from B on
    are never read, and come back as zeros.

    Attributes:
        x: bfloat16 or float16 [padded_rows(B), D], the residual stream.
        normed: the same shape and dtype, ``x`` after this layer's first norm.
        weights: of this layer; under tensor parallelism this device's share of them.
        next_norm: [D], scale of the RMSNorm that follows: the next layer's first, or the model's last.
        pool: [P, 2, K, S, H] or ``QuantizedPool``; finite everywhere, unused slots included. Updated in place if it is
            donated.
        block_tables: int32 [B, M], physical blocks of each sequence. Entries beyond its length are not used.
        positions: int32 [B], the position of the new token, which is the number of tokens in the pool. A row with −1
            has no token: nothing is written for it, and its result is unspecified.
        cos: float32 [B, H/2], of the rotary angles of ``positions``; element i is paired with i + H/2.
        sin: float32 [B, H/2].
        scores: scale and window of attention; other options are refused.
        num_heads: N, of this device.
        eps: of both norms.
        axis_name: inside ``shard_map``, the mesh axis that the heads and the MLP are sharded over.
    """

    OP: ClassVar = "decode_layer"

    x: jax.Array
    normed: jax.Array
    weights: LayerWeights
    next_norm: jax.Array
    pool: Pool
    block_tables: jax.Array
    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    scores: ScoreOptions = field(kw_only=True)
    num_heads: int = field(kw_only=True, metadata={"static": True})
    eps: float = field(kw_only=True, metadata={"static": True})
    axis_name: str | None = field(default=None, kw_only=True, metadata={"static": True})

    @property
    def tokens(self) -> int:
        """B."""
        return int(self.positions.shape[0])

    @property
    def heads(self) -> Heads:
        """N, K and H."""
        return Heads(self.num_heads, int(stored(self.pool).shape[2]), 2 * int(self.cos.shape[1]))

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes that do not fit together, or an option out of its range."""
        x, tokens, heads, hidden = self.x, self.tokens, self.heads, self.x.shape[1]
        if x.shape != self.normed.shape or x.shape[0] != padded_rows(tokens):
            raise ValueError(
                f"x {x.shape} and normed {self.normed.shape} must have {padded_rows(tokens)} rows for {tokens} "
                "positions; pad them with padded_rows"
            )
        if {array.shape[0] for array in (self.block_tables, self.cos, self.sin)} != {tokens}:
            raise ValueError(
                f"block_tables {self.block_tables.shape}, cos {self.cos.shape} and sin {self.sin.shape} must each "
                f"have one row for each of the {tokens} positions"
            )
        if heads.queries % heads.kv:
            raise ValueError(f"num_heads={heads.queries} is not a multiple of the pool's {heads.kv} KV heads")
        self.scores.validate(heads.queries)
        mlp = weight_shape(self.weights.down)[0]
        expected = {
            "wqkv": (hidden, (heads.queries + 2 * heads.kv) * heads.size),
            "wo": (heads.queries * heads.size, hidden),
            "gate_up": (hidden, 2 * mlp),
            "down": (mlp, hidden),
        }
        for name, shape in expected.items():
            found = weight_shape(getattr(self.weights, name))
            if found != shape:
                raise ValueError(f"weights.{name} is {found}, expected {shape}")


def padded_rows(tokens: int) -> int:
    """Rows of the activations of ``tokens`` sequences: whole tensor-core tiles of 16."""
    return -(-tokens // 16) * 16
