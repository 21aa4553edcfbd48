"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.model_sizes import MODELS
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.w4a16_matmul.call import W4A16MatmulCall
from pallas_kernels.w4a16_matmul.layout import CHUNK, assemble, packed_shape, part_shapes
from pallas_kernels.w4a16_matmul.tiles import MAX_DECODE_ROWS, Tiles, candidates, choose, key


@dataclass(frozen=True)
class Shape:
    """[M, K] times [K, N] in groups of g; ``bar`` marks the shapes whose instructions per weight are limited."""

    model: str
    m: int
    k: int
    n: int
    group_size: int = 128
    dtype: str = "bfloat16"
    bias: bool = False
    symmetric: bool = False
    bar: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.m <= MAX_DECODE_ROWS else "prefill"

    def __str__(self) -> str:
        marks = f"{' bias' if self.bias else ''}{' symmetric' if self.symmetric else ''}"
        return f"{self.model} M={self.m} K={self.k} N={self.n} g={self.group_size} {self.dtype}{marks}"


def _layer(model: str, m: int) -> Iterator[Shape]:
    """The four products of a layer."""
    for name, (k, n) in MODELS[model].linears.items():
        bias = name == "qkv" and MODELS[model].qkv_bias
        yield Shape(f"{model} {name}", m, k, n, bias=bias, bar=model == "Llama-3-8B" and m <= 16)


def _shapes() -> Iterator[Shape]:
    for m in (1, 16, 64, 4096):
        yield from _layer("Llama-3-8B", m)
    hidden, mlp = MODELS["Llama-3-8B"].hidden, MODELS["Llama-3-8B"].mlp
    for m in (1, 2, 4, 8, 16, 4096):
        yield Shape("Llama-3-8B gate", m, hidden, mlp)
    for m in (2, 4, 8):
        yield Shape("Llama-3-8B down", m, mlp, hidden)
    for model in list(MODELS)[1:]:
        for m in (1, 4096):
            yield from _layer(model, m)


SHAPES = tuple(_shapes())

TEST_SHAPES = (
    Shape("one row", 1, 256, 128),
    Shape("three rows, groups of 32", 3, 256, 64, group_size=32),
    Shape("a full tile, groups of 64, bias", 16, 384, 128, group_size=64, bias=True),
    Shape("one row more, float16", 17, 256, 128, dtype="float16", bias=True),
    Shape("most rows of decode, symmetric", 64, 512, 128, symmetric=True),
    Shape("prefill, the last tile not full, groups of 32", 257, 256, 128, group_size=32),
    Shape("prefill, float16, bias", 128, 256, 64, group_size=64, dtype="float16", bias=True, symmetric=True),
    Shape("narrow tiles", 3, 256, 48),
    Shape("a group per column", 16, 512, 64, group_size=-1, dtype="float16"),
)


def make_call(shape: Shape, seed: int = 0) -> W4A16MatmulCall:
    """Return a call of ``shape``, drawn on the device."""
    keys = jax.random.split(jax.random.key(seed), 5)
    dtype, packed = jnp.dtype(shape.dtype), packed_shape(shape.k, (shape.n,), _stored_group(shape))
    words_shape, groups_shape = part_shapes(packed)
    groups = 1 if shape.group_size == -1 else shape.k // shape.group_size
    x = jax.random.normal(keys[0], (shape.m, shape.k), dtype)
    words = jax.random.bits(keys[1], words_shape, jnp.uint32)
    scales = jax.random.uniform(keys[2], (groups, shape.n), jnp.float16, 0.01, 0.03)
    zeros = jnp.full((groups, shape.n), 8, jnp.int32)
    if not shape.symmetric:
        zeros = jax.random.randint(keys[3], (groups, shape.n), 0, 17, jnp.int32)
    stored = groups_shape[0] * groups_shape[1]
    scales, zeros = (jnp.repeat(rows, stored // groups, axis=0).reshape(groups_shape) for rows in (scales, zeros))
    bias = jax.random.normal(keys[4], (shape.n,), dtype) if shape.bias else None
    return W4A16MatmulCall(x, assemble(words, scales, zeros), bias)


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, floating-point operations)."""
    packed = 4 * math.prod(packed_shape(shape.k, (shape.n,), _stored_group(shape)))
    activations = jnp.dtype(shape.dtype).itemsize * (shape.m * (shape.k + shape.n) + shape.bias * shape.n)
    return packed + activations, 2 * shape.m * shape.k * shape.n


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.m, shape.k, shape.n, _stored_group(shape), shape.dtype, DEVICES[device].target)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return key(shape.m, shape.k, shape.n, _stored_group(shape), shape.dtype)


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.m, shape.k, shape.n)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Weights that one trip of a program's loop consumes: a chunk of its columns."""
    return CHUNK * tiles.tile_n


def _stored_group(shape: Shape) -> int:
    return CHUNK if shape.group_size == -1 else shape.group_size
