"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul.tiles import LARGEST_DECODE, Call, Tiles, candidates, choose, tile_r
from pallas_kernels.model_sizes import MODELS
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.target import current_target

RUN = 32
"""Neighbouring tokens of a prompt, which share an adapter."""


@dataclass(frozen=True)
class Shape:
    """[T, K] · [K, R] · [R, N] for T tokens of ``slots`` adapters of the last of ``layers``.

    ``mixed`` adapters have less than R ranks, some of them; some tokens have no adapter, and one slot is empty. ``bar``
    marks shapes that a static bar is set for: none here.
    """

    model: str
    tokens: int
    k: int
    n: int
    rank: int = 16
    slots: int = 8
    layers: int = 1
    mixed: bool = False
    dtype: str = "bfloat16"
    bar: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.tokens <= LARGEST_DECODE else "prefill"

    @property
    def used(self) -> int:
        """Adapters that some token uses."""
        sharing = 1 if self.phase == "decode" else RUN
        return min(self.slots - self.mixed, -(-self.tokens // sharing))

    @property
    def call(self) -> Call:
        """What tiles are chosen for."""
        return Call(self.tokens, self.k, self.n, self.rank, self.slots, self.dtype)

    def __str__(self) -> str:
        entries = f"R={self.rank} S={self.slots}{f' L={self.layers}' if self.layers > 1 else ''}"
        mixed = " mixed" if self.mixed else ""
        return f"{self.model} T={self.tokens} K={self.k} N={self.n} {entries}{mixed} {self.dtype}"


def _shapes() -> Iterator[Shape]:
    for model, sizes in MODELS.items():
        for tokens in (64, 1, 16, 256, 4096) if model == "Llama-3-8B" else (64,):
            for name, (k, n) in sizes.linears.items():
                yield Shape(f"{model} {name}", tokens, k, n)
    k, n = MODELS["Llama-3-8B"].linears["qkv"]
    for tokens in (64, 4096):
        yield Shape("Llama-3-8B qkv", tokens, k, n, rank=64, slots=32)


SHAPES = tuple(_shapes())

TEST_SHAPES = (
    Shape("one token", 1, 256, 96, slots=4),
    Shape("edges within tiles, many layers", 5, 200, 72, slots=4, layers=3, mixed=True),
    Shape("one slot", 16, 64, 32, rank=48, slots=1, dtype="float32"),
    Shape("several ranks to a program", 37, 96, 80, rank=144, slots=3, mixed=True, dtype="float16"),
    Shape("odd sizes", 3, 77, 45, rank=32, slots=2, dtype="float32"),
    Shape("prefill, edges within tiles", 300, 160, 136, rank=32, slots=3, mixed=True),
)


def make_args(shape: Shape, seed: int = 0) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Arguments and keywords for the op, drawn on the device."""
    keys, dtype, entries = jax.random.split(jax.random.key(seed), 5), jnp.dtype(shape.dtype), shape.layers * shape.slots
    x = jax.random.normal(keys[0], (shape.tokens, shape.k), dtype)
    ranks = jnp.full(entries, shape.rank, jnp.int32)
    if shape.mixed:
        ranks = jnp.maximum(8, shape.rank - 24 * (jnp.arange(entries, dtype=jnp.int32) % 3))
    within = jnp.arange(shape.rank) < ranks[:, None]
    a = jax.random.normal(keys[1], (entries, shape.k, shape.rank), dtype) * jnp.asarray(shape.k**-0.5, dtype)
    b = jax.random.normal(keys[2], (entries, shape.rank, shape.n), dtype)
    a, b = (
        jnp.where(mask, array, jnp.zeros((), dtype)) for mask, array in ((within[:, None], a), (within[..., None], b))
    )
    mine = entries - 1 - jax.random.permutation(keys[3], shape.slots)
    candidates = jnp.where(jnp.arange(shape.slots) < shape.slots - shape.mixed, mine, -1).astype(jnp.int32)
    return (x, a, b, candidates[_slots(shape, keys[4])], candidates, ranks), {}


def _slots(shape: Shape, key: jax.Array) -> jax.Array:
    """The place among the candidates of each token's adapter; that of an empty slot, the last, for tokens without."""
    turn = jnp.arange(shape.tokens) // (1 if shape.phase == "decode" else RUN)
    slot = jax.random.permutation(key, turn) % shape.used if shape.phase == "decode" else turn % shape.used
    return jnp.where(turn % 5 == 3, shape.slots - 1, slot) if shape.mixed else slot


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, floating-point operations)."""
    floats = (shape.tokens + shape.used * shape.rank) * (shape.k + shape.n)
    return jnp.dtype(shape.dtype).itemsize * floats, 2 * shape.tokens * shape.rank * (shape.k + shape.n)


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.call, DEVICES[device].target)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return shape.call.key


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.call, current_target().cores or 1)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Elements of an adapter that a step of the first kernel multiplies. A few steps make no loop to count."""
    return tiles.tile_k * tile_r(shape.rank)
