"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.model_sizes import DISTINCT
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.rms_norm.call import RMSNormCall
from pallas_kernels.rms_norm.tiles import Tiles, candidates, choose, key


@dataclass(frozen=True)
class Shape:
    """T tokens of D elements; ``bar`` marks shapes that a static bar is set for: none here."""

    model: str
    tokens: int
    width: int
    residual: bool = True
    dtype: str = "bfloat16"
    bar: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.tokens <= 256 else "prefill"

    def __str__(self) -> str:
        return f"{self.model} T={self.tokens} D={self.width}{' +residual' if self.residual else ''} {self.dtype}"


SHAPES = tuple(Shape(model, tokens, sizes.hidden) for model, sizes in DISTINCT.items() for tokens in (16, 256, 4096))

TEST_SHAPES = (
    Shape("one token", 1, 128),
    Shape("width no power of two", 3, 224, residual=False),
    Shape("several tokens a program, the last not full", 17, 64),
    Shape("float16", 5, 384, dtype="float16"),
    Shape("float32", 16, 96, residual=False, dtype="float32"),
    Shape("odd width", 2, 77, dtype="float32"),
)


def make_call(shape: Shape, seed: int = 0) -> RMSNormCall:
    """Return a call of ``shape``, drawn on the device."""
    size, dtype = (shape.tokens, shape.width), jnp.dtype(shape.dtype)
    keys = jax.random.split(jax.random.key(seed), 3)
    x, residual = (jax.random.normal(k, size, dtype) for k in keys[:2])
    scale = jax.random.uniform(keys[2], (shape.width,), dtype, 0.5, 1.5)
    return RMSNormCall(x, scale, residual if shape.residual else None)


def carry(call: RMSNormCall, out: Any) -> RMSNormCall:
    """Return the next call as in a model: the normed tokens change and are added to the sum."""
    if call.residual is None:
        return replace(call, x=out)
    return replace(call, x=out[0], residual=out[1])


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, floating-point operations)."""
    elements = shape.tokens * shape.width
    arrays = 4 if shape.residual else 2
    itemsize = jnp.dtype(shape.dtype).itemsize
    return itemsize * (arrays * elements + shape.width), elements * (5 if shape.residual else 4)


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.tokens, shape.width, shape.dtype, shape.residual, DEVICES[device].target)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return key(shape.tokens, shape.width, shape.dtype, shape.residual)


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.width)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Elements that a program norms; it does so without a loop."""
    return tiles.tile_m * shape.width
