"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.model_sizes import MODELS
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.paged_attention.call import PagedAttentionCall
from pallas_kernels.paged_attention.tiles import ProblemSize, Tiles, candidates, choose
from pallas_kernels.score_options import ScoreOptions

NOWHERE = 10**6
"""What block tables hold beyond a row's context."""


@dataclass(frozen=True)
class Shape:
    """Sequences, each with ``rows`` rows of ``queries`` tokens, one after the other.

    Attributes:
        contexts: tokens before the first row of each sequence, in turn.
        kv: ``bf16`` for what ``dtype`` is, ``int8`` or ``int4``.
        lengths: real tokens of each row, in turn; ``None`` has no padding.
        slopes: with ALiBi slopes.
        sinks: with a sink per head.
        shared: block tables are drawn with repetition, so that sequences share blocks.
        bar: a static bar is set for it.
    """

    model: str
    sequences: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    contexts: tuple[int, ...]
    kv: str = "bf16"
    rows: int = 1
    block_size: int = 64
    lengths: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float | None = None
    slopes: bool = False
    sinks: bool = False
    dtype: str = "bfloat16"
    shared: bool = False
    bar: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.queries == 1 else "prefill"

    @property
    def entries(self) -> int:
        """M, entries of a block table."""
        return int(pl.cdiv(max(self.contexts) + self.rows * self.queries, self.block_size))

    @property
    def bits(self) -> int | None:
        """Bits of a quantised element."""
        return None if self.kv == "bf16" else int(self.kv.removeprefix("int"))

    @property
    def problem(self) -> ProblemSize:
        """What its tiles depend on."""
        rows, group = self.sequences * self.rows, self.heads // self.kv_heads
        context = self.entries * self.block_size
        return ProblemSize(rows, self.queries, self.kv_heads, group, self.head_dim, self.block_size, context, self.bits)

    def __str__(self) -> str:
        context = "/".join(str(context) for context in self.contexts)
        heads = f"{self.heads}/{self.kv_heads}x{self.head_dim}"
        rows = f"{self.sequences * self.rows}x{self.queries}"
        return f"{self.model} {rows} at {context} heads={heads} S={self.block_size} {self.kv} {self.dtype}"


def _decode(model: str, batch: int, context: int, kv: str, bar: bool = False) -> Shape:
    """One token of each of ``batch`` sequences."""
    sizes = MODELS[model]
    return Shape(model, batch, 1, sizes.heads, sizes.kv_heads, sizes.head_dim, (context,), kv, bar=bar)


def _prefill(model: str, queries: int, context: int, kv: str) -> Shape:
    """2048 tokens of one sequence, after a context, in rows of ``queries``."""
    sizes = MODELS[model]
    heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
    return Shape(model, 1, queries, *heads, (context,), kv, rows=2048 // queries)


def _real() -> Iterator[Shape]:
    for kv in ("bf16", "int8", "int4"):
        for batch in (1, 64, 16, 256):
            yield _decode("Llama-3-8B", batch, 4095, kv, bar=batch in (1, 64))
        yield _decode("Llama-3-8B", 16, 32767, kv)
        for queries, context in ((32, 2048), (64, 2048), (128, 2048), (32, 0)):
            yield _prefill("Llama-3-8B", queries, context, kv)
        for model in list(MODELS)[1:]:
            yield _decode(model, 16, 4095, kv)
            yield _prefill(model, 32, 2048, kv)


SHAPES = tuple(_real())

_EDGES = (0, 14, 15, 16, 63, 64, 100)
"""With the token itself: contexts of 1, a block - 1, a block, a block + 1, for blocks of 16 and of 64."""

TEST_SHAPES = (
    Shape("blocks gathered", 7, 1, 8, 2, 64, _EDGES, block_size=16),
    Shape("block is tile", 7, 1, 4, 4, 64, _EDGES, shared=True, dtype="float16"),
    Shape("tile in block", 3, 1, 6, 2, 128, (126, 127, 128), block_size=128, window=20),
    Shape("odd group", 7, 1, 7, 1, 80, _EDGES, "int8", block_size=32, shared=True),
    Shape("int4", 7, 1, 8, 2, 64, _EDGES, "int4", block_size=16, window=30),
    Shape("widest", 3, 1, 4, 1, 256, (0, 31, 70), "int4", softcap=2.0),
    Shape("long", 2, 1, 2, 1, 64, (900, 513), "int8", block_size=16),
    Shape("chunk", 4, 20, 6, 2, 80, (0, 15, 16, 77), block_size=16, lengths=(20, 1, 0, 13)),
    Shape("chunk, large blocks", 2, 24, 6, 2, 64, (0, 100)),  # No padding: the tuner compares whole results.
    Shape("rows of a chunk", 2, 32, 4, 2, 64, (0, 40), rows=2, block_size=32, window=25, softcap=3.0),
    Shape("quantised chunk", 3, 20, 4, 1, 96, (0, 50, 63), "int8", lengths=(20, 7, 0), softcap=2.0),
    Shape("multi-head chunk", 3, 64, 2, 2, 64, (0, 1, 30), "int4", block_size=16, window=33, dtype="float16"),
    Shape("sinks, slopes", 7, 1, 6, 2, 64, _EDGES, "int8", block_size=16, window=30, slopes=True, sinks=True),
    Shape("sinks", 7, 1, 8, 2, 64, _EDGES, block_size=16, sinks=True),
    Shape(
        "chunk, slopes",
        4,
        20,
        6,
        2,
        80,
        (0, 15, 16, 77),
        block_size=16,
        lengths=(20, 1, 0, 13),
        softcap=2.0,
        slopes=True,
    ),
)


def make_call(shape: Shape, seed: int = 0) -> PagedAttentionCall:
    """Return a call of ``shape``, drawn on the device."""
    keys = jax.random.split(jax.random.key(seed), 3)
    rows = shape.sequences * shape.rows
    dtype = jnp.dtype(shape.dtype)
    q = jax.random.normal(keys[0], (rows, shape.queries, shape.heads, shape.head_dim), dtype)
    blocks = shape.sequences * shape.entries
    if shape.shared:
        tables = jax.random.randint(keys[1], (shape.sequences, shape.entries), 0, blocks, jnp.int32)
    else:
        tables = jax.random.permutation(keys[1], jnp.arange(blocks, dtype=jnp.int32)).reshape(shape.sequences, -1)
    contexts = jnp.resize(jnp.array(shape.contexts, jnp.int32), (shape.sequences,))
    firsts = (contexts[:, None] + jnp.arange(shape.rows, dtype=jnp.int32) * shape.queries).reshape(-1)
    lengths = jnp.resize(jnp.array(shape.lengths or (shape.queries,), jnp.int32), (rows,))
    used = (firsts + lengths)[:, None] > jnp.arange(shape.entries, dtype=jnp.int32) * shape.block_size
    tables = jnp.where(used, jnp.repeat(tables, shape.rows, axis=0), NOWHERE)
    return PagedAttentionCall(q, _make_pool(shape, blocks, keys[2]), tables, firsts, lengths, scores=_scores(shape))


def _scores(shape: Shape) -> ScoreOptions:
    """Slopes are ALiBi's for a power of two of heads; sinks lie among the largest logits."""
    heads = jnp.arange(1, shape.heads + 1, dtype=jnp.float32)
    slopes = 2 ** (-8 * heads / shape.heads) if shape.slopes else None
    sinks = jnp.cos(heads) + 2 if shape.sinks else None
    return ScoreOptions(shape.head_dim**-0.5, shape.window, shape.softcap, slopes, sinks)


def _make_pool(shape: Shape, blocks: int, key: jax.Array) -> Pool:
    """Elements of about the normal distribution's size."""
    values = (blocks, 2, shape.kv_heads, shape.block_size, shape.head_dim)
    if shape.bits is None:
        return jax.random.normal(key, values, jnp.dtype(shape.dtype))
    keys = jax.random.split(key, 3)
    q = jax.random.bits(keys[0], (*values[:-1], shape.head_dim * shape.bits // 8), jnp.uint8)
    pair = (*values[:3], 1, shape.block_size)
    scale = jax.random.uniform(keys[1], pair, jnp.float16, 2.0, 4.0) / (2**shape.bits - 1)
    zero = jax.random.uniform(keys[2], pair, jnp.float16, -2.0, -1.0)
    return QuantizedPool(q, jnp.concatenate([scale, zero], axis=3))


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, floating-point operations). Rows of a sequence share its keys and values."""
    element = shape.head_dim * (shape.bits or 16) // 8 + (4 if shape.bits else 0)
    read, pairs = 0, 0
    for sequence in range(shape.sequences):
        context = shape.contexts[sequence % len(shape.contexts)]
        new = shape.rows * shape.queries
        seen = [min(position + 1, shape.window or position + 1) for position in range(context, context + new)]
        read += min(context + new, seen[0] + new - 1)
        pairs += sum(seen)
    vectors = 2 * shape.sequences * shape.rows * shape.queries * shape.heads * shape.head_dim
    return 2 * read * shape.kv_heads * element + 2 * vectors, 4 * pairs * shape.heads * shape.head_dim


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.problem, DEVICES[device].target)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return shape.problem.key


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.problem)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Elements of keys and values that a program visits at a time."""
    return 2 * tiles.tile_n * shape.head_dim
