"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.model_sizes import MODELS
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.target import current_target
from pallas_kernels.w8a8_matmul.call import W8A8MatmulCall
from pallas_kernels.w8a8_matmul.tiles import MAX_DECODE, Tiles, candidates, choose, key


@dataclass(frozen=True)
class Shape:
    """[M, K] · [N, K]; ``bar`` marks shapes that a static bar is set for: none here."""

    model: str
    m: int
    k: int
    n: int
    bias: bool = False
    dtype: str = "bfloat16"
    bar: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.m <= MAX_DECODE else "prefill"

    def __str__(self) -> str:
        return f"{self.model} M={self.m} K={self.k} N={self.n}{' +bias' if self.bias else ''} {self.dtype}"


def _shapes() -> Iterator[Shape]:
    for model, sizes in MODELS.items():
        for m in (1, 16, 64, 4096) if model == "Llama-3-8B" else (16, 4096):
            for name, (k, n) in sizes.linears.items():
                yield Shape(f"{model} {name}", m, k, n, bias=name == "qkv" and sizes.qkv_bias)


SHAPES = tuple(_shapes())

TEST_SHAPES = (
    Shape("one token, split K", 1, 1024, 96),
    Shape("edges within tiles, bias", 3, 160, 72, bias=True),
    Shape("full tile of tokens", 16, 512, 128),
    Shape("two rows of the tensor core", 17, 256, 64, bias=True, dtype="float16"),
    Shape("largest decode", 64, 128, 80),
    Shape("prefill, edges within tiles", 257, 96, 200, bias=True, dtype="float32"),
    Shape("prefill, more rows of tiles than a group", 1025, 32, 128),
)


def make_call(shape: Shape, seed: int = 0) -> W8A8MatmulCall:
    """Return a call of ``shape``, drawn on the device. Of several tokens the last is zero."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (shape.m, shape.k), jnp.dtype(shape.dtype))
    if shape.m > 1:
        x = x.at[-1].set(0)
    weight = jax.random.randint(keys[1], (shape.n, shape.k), -127, 128, jnp.int8)
    scales = jax.random.uniform(keys[2], (shape.n,), jnp.float32, 0.5, 1.5) / (73 * shape.k**0.5)
    bias = jax.random.normal(keys[3], (shape.n,), jnp.dtype(shape.dtype)) if shape.bias else None
    return W8A8MatmulCall(x, weight, scales, bias)


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, integer operations)."""
    itemsize = jnp.dtype(shape.dtype).itemsize
    floats = shape.m * (shape.k + shape.n) + shape.bias * shape.n
    return shape.k * shape.n + 4 * shape.n + itemsize * floats, 2 * shape.m * shape.k * shape.n


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.m, shape.k, shape.n, shape.dtype, DEVICES[device].target)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return key(shape.m, shape.k, shape.n, shape.dtype)


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.m, shape.k, shape.n, current_target().cores or 1)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Weights that one trip of a program's loop multiplies."""
    return tiles.tile_n * tiles.tile_k
