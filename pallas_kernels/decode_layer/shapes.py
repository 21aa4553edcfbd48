"""Layers of real models and small ones for tests, with arguments for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.call import DecodeLayerCall, padded_rows
from pallas_kernels.decode_layer.tiles import ProblemSize, Tiles, candidates, choose
from pallas_kernels.decode_layer.weights import LayerWeights
from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.model_sizes import MODELS
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.score_options import ScoreOptions
from pallas_kernels.target import current_target
from pallas_kernels.w4a16_matmul.layout import CHUNK, assemble, packed_shape, part_shapes


@dataclass(frozen=True)
class Shape:
    """A call: B sequences with contexts of up to M blocks; ``group`` is g of packed weights, ``None`` if plain."""

    model: str
    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    group: int | None = 128
    kv_bits: int = 16
    block_size: int = 64
    entries: int = 64
    bias: bool = False
    window: int | None = None
    dtype: str = "bfloat16"
    bar: bool = False

    @property
    def phase(self) -> str:
        """Always decode."""
        return "decode"

    @property
    def kv(self) -> str:
        """What the pool holds."""
        floats = {"bfloat16": "bf16", "float16": "fp16"}[self.dtype]
        return {16: floats, 8: "int8", 4: "int4"}[self.kv_bits]

    def __str__(self) -> str:
        weights = "plain" if self.group is None else f"4-bit g={self.group}"
        return f"{self.model} B={self.tokens} M={self.entries} S={self.block_size} {weights} weights, {self.kv} KV"

    @property
    def problem(self) -> ProblemSize:
        """What tiles depend on."""
        return ProblemSize(
            tokens=self.tokens,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp=self.mlp,
            block_size=self.block_size,
            context=self.entries,
            weight_bits=16 if self.group is None else 4,
            kv_bits=self.kv_bits,
            parallel=False,
        )

    @property
    def blocks(self) -> int:
        """P: a block of its own for every entry of every table, and one that nobody has."""
        return self.tokens * self.entries + 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each weight."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "wqkv": (self.hidden, qkv),
            "wo": (self.heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.mlp),
            "down": (self.mlp, self.hidden),
        }


def model_shape(model: str, tokens: int, **options: Any) -> Shape:
    """A layer of ``model``; ``options`` are further fields of ``Shape``."""
    sizes = MODELS[model]
    widths = (sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.mlp)
    return Shape(model, tokens, *widths, bias=sizes.qkv_bias, **options)


SHAPES = (
    *(model_shape(model, tokens) for model in MODELS for tokens in (1, 16)),
    *(model_shape("Llama-3-8B", tokens, kv_bits=bits) for tokens in (1, 64) for bits in (16, 8, 4)),
    *(model_shape("Llama-3-8B", tokens, group=None) for tokens in (1, 64)),
    model_shape("Llama-3-8B", 256, entries=16),
)

TEST_SHAPES = (
    Shape("tiny", 3, 256, 4, 2, 64, 256, block_size=16, entries=6),
    Shape("tiny 8-bit KV", 3, 256, 4, 2, 128, 256, 32, 8, block_size=16, entries=6, window=37),
    Shape("tiny 4-bit KV", 3, 256, 4, 2, 64, 256, 64, 4, block_size=16, entries=6, bias=True),
    Shape("tiny plain", 1, 256, 4, 2, 128, 256, None, 16, block_size=16, entries=6, bias=True),
    Shape("tiny plain 8-bit KV", 17, 256, 4, 2, 64, 256, None, 8, block_size=16, entries=6),
    Shape("tiny plain 4-bit KV", 3, 256, 6, 2, 128, 256, None, 4, block_size=128, entries=1),
    Shape("tiny, large blocks", 3, 256, 4, 4, 64, 256, 128, 8, block_size=128, entries=2, window=1),
    Shape("tiny float16", 3, 256, 4, 1, 64, 256, 128, 4, block_size=64, entries=2, dtype="float16"),
)


def make_call(shape: Shape, seed: int = 0) -> DecodeLayerCall:
    """Return a call of ``shape``: contexts of all lengths up to M · S, their blocks shuffled over the pool."""
    keys = iter(jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), 32))
    dtype, rows = jnp.dtype(shape.dtype), padded_rows(shape.tokens)

    def normal(*size: int, deviation: float = 1.0) -> jax.Array:
        return (deviation * jax.random.normal(next(keys), size, jnp.float32)).astype(dtype)

    x = normal(rows, shape.hidden)
    wide = x.astype(jnp.float32)
    normed = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + 1e-5)).astype(dtype)
    arrays = {name: make_weight(next(keys), *size, shape.group, dtype) for name, size in shape.linears.items()}
    biases = {}
    if shape.bias:
        columns = {"bqkv": "wqkv", "bo": "wo", "gate_up_bias": "gate_up", "down_bias": "down"}
        biases = {name: normal(shape.linears[weight][1], deviation=0.5) for name, weight in columns.items()}
    mlp_norm, next_norm = (1 + normal(shape.hidden, deviation=0.1).astype(jnp.float32) for _ in range(2))
    weights = LayerWeights(**arrays, **biases, mlp_norm=mlp_norm.astype(dtype))

    tables = jax.random.permutation(next(keys), shape.blocks - 1).astype(jnp.int32)
    positions = jax.random.randint(next(keys), (shape.tokens,), 0, shape.entries * shape.block_size, jnp.int32)
    cos, sin = rotary(positions, shape.head_dim)
    pool = make_pool(next(keys), shape, shape.blocks)
    tables = tables.reshape(shape.tokens, shape.entries)
    return DecodeLayerCall(
        x=x,
        normed=normed,
        weights=weights,
        next_norm=next_norm.astype(dtype),
        pool=pool,
        block_tables=tables,
        positions=positions,
        cos=cos,
        sin=sin,
        scores=ScoreOptions(shape.head_dim**-0.5, shape.window),
        num_heads=shape.heads,
        eps=1e-5,
    )


def make_weight(key: jax.Array, rows: int, columns: int, group: int | None, dtype: jnp.dtype) -> jax.Array:
    """A weight of deviation ``rows ** -0.5``, plain or packed with groups of ``group`` rows."""
    first, second, third = jax.random.split(key, 3)
    if group is None:
        plain: jax.Array = jax.random.normal(first, (rows, columns), jnp.float32) * rows**-0.5
        return plain.astype(dtype)
    words_shape, groups_shape = part_shapes(packed_shape(rows, (columns,), group))
    words = jax.random.bits(first, words_shape, jnp.uint32)
    spread = jax.random.uniform(second, groups_shape, jnp.float32, 0.5, 1.5)
    scales = (spread * (rows**-0.5 / 5)).astype(jnp.float16)
    zeros = jax.random.randint(third, scales.shape, 6, 11, jnp.uint32)
    return assemble(words, scales, zeros)


def make_pool(key: jax.Array, shape: Shape, blocks: int) -> Pool:
    """A pool of ``blocks`` blocks."""
    size = (blocks, 2, shape.kv_heads, shape.block_size)
    if shape.kv_bits == 16:
        return jax.random.normal(key, (*size, shape.head_dim), jnp.dtype(shape.dtype))
    values = jax.random.bits(key, (*size, shape.head_dim * shape.kv_bits // 8), jnp.uint8)
    steps = jnp.float32(1 / 2 ** (shape.kv_bits - 2))
    scales = steps * jax.random.uniform(key, (*size[:3], 1, shape.block_size), jnp.float32, 0.5, 1.5)
    zeros = -scales * 2 ** (shape.kv_bits - 1)
    return QuantizedPool(values, jnp.concatenate([scales, zeros], axis=3).astype(jnp.float16))


def rotary(positions: jax.Array, head_dim: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cos and sin float32 [B, H/2] of the rotary angles of ``positions`` [B]."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[:, None] * theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def carry(call: DecodeLayerCall, out: tuple[jax.Array, jax.Array, Pool]) -> DecodeLayerCall:
    """Return the next call: the same layer again, over the pool that it updated in place."""
    x, normed, pool = out
    return replace(call, x=x, normed=normed, pool=pool)


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move: weights once, every visible key and value once; floating-point operations)."""
    elements = sum(math.prod(size) for size in shape.linears.values())
    weight_bytes = 2 * elements if shape.group is None else elements // 2 + elements // shape.group * 4
    context = shape.tokens * shape.entries * shape.block_size // 2
    if shape.window is not None:
        context = min(context, shape.tokens * shape.window)
    kv_bytes = 2 * context * shape.kv_heads * (shape.head_dim * shape.kv_bits // 8 + (4 if shape.kv_bits < 16 else 0))
    operations = 2 * shape.tokens * elements + 4 * context * shape.heads * shape.head_dim
    return weight_bytes + kv_bytes, operations


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(DEVICES[device].target, shape.problem, None)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return shape.problem.key


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(current_target(), shape.problem)


def elements_per_trip(shape: Shape, tiles: Tiles) -> dict[str, int]:
    """Kernel → weights, or KV elements (keys and values together), that a trip of its hot loop takes."""
    per_trip = {
        "qkv": CHUNK * tiles.qkv_columns,
        "attend": 2 * tiles.attend_tokens * shape.head_dim,
        "out": CHUNK * tiles.out_columns,
        "gate_up": 2 * CHUNK * tiles.gate_up_columns,
        "down": CHUNK * tiles.down_columns,
    }
    return {f"decode_layer_{name}": elements for name, elements in per_trip.items()}
