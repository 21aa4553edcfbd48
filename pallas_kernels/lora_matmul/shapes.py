"""Calls as real models make them, for bench, tuner and static check; small ones that cover every path, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_matmul.call import LoRAMatmulCall
from pallas_kernels.lora_matmul.tiles import MAX_DECODE, ProblemSize, Tiles, candidates, choose, tile_r
from pallas_kernels.model_sizes import MODELS, ModelSizes
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.target import current_target

RUN = 32
"""Neighbouring tokens of a prompt, which share an adapter."""


@dataclass(frozen=True)
class Shape:
    """[T, K] · [K, M·R] · [R, N] for T tokens of ``slots`` adapters of the last of ``layers``.

    ``mixed`` adapters have less than R ranks, some of them; some tokens have no adapter, and one slot is empty.
    ``segments`` are those of the op. ``bar`` marks shapes that a static bar is set for: none here.
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
    segments: tuple[int, ...] | None = None
    bar: bool = False

    @property
    def phase(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.tokens <= MAX_DECODE else "prefill"

    @property
    def used(self) -> int:
        """Adapters that some token uses."""
        sharing = 1 if self.phase == "decode" else RUN
        return min(self.slots - self.mixed, -(-self.tokens // sharing))

    @property
    def modules(self) -> int:
        """M."""
        return len(self.segments or (self.n,))

    @property
    def problem(self) -> ProblemSize:
        """What tiles are chosen for."""
        return ProblemSize(self.tokens, self.k, self.n, self.rank, self.slots, self.dtype, self.modules)

    def __str__(self) -> str:
        entries = f"R={self.rank} S={self.slots}{f' L={self.layers}' if self.layers > 1 else ''}"
        mixed = " mixed" if self.mixed else ""
        apart = f" {'+'.join(map(str, self.segments))}" if self.segments else ""
        return f"{self.model} T={self.tokens} K={self.k} N={self.n}{apart} {entries}{mixed} {self.dtype}"


def _shapes() -> Iterator[Shape]:
    for model, sizes in MODELS.items():
        for tokens in (64, 1, 16, 256, 4096) if model == "Llama-3-8B" else (64,):
            for name, (k, n) in sizes.linears.items():
                yield Shape(f"{model} {name}", tokens, k, n, segments=_segments(sizes, name))
    sizes = MODELS["Llama-3-8B"]
    k, n = sizes.linears["qkv"]
    for tokens in (64, 4096):
        yield Shape("Llama-3-8B qkv", tokens, k, n, rank=64, slots=32, segments=_segments(sizes, "qkv"))


def _segments(sizes: ModelSizes, name: str) -> tuple[int, ...] | None:
    """Query heads, key and value of each KV head; gate and up."""
    size = sizes.head_dim
    qkv = (sizes.heads // sizes.kv_heads * size, size, size)
    return {"qkv": qkv, "gate_up": (sizes.mlp, sizes.mlp)}.get(name)


SHAPES = tuple(_shapes())

TEST_SHAPES = (
    Shape("one token", 1, 256, 96, slots=4),
    Shape("edges within tiles, many layers", 5, 200, 72, slots=4, layers=3, mixed=True),
    Shape("one slot", 16, 64, 32, rank=48, slots=1, dtype="float32"),
    Shape("several ranks to a program", 37, 96, 80, rank=144, slots=3, mixed=True, dtype="float16"),
    Shape("odd sizes", 3, 77, 45, rank=32, slots=2, dtype="float32"),
    Shape("prefill, edges within tiles", 300, 160, 136, rank=32, slots=3, mixed=True),
    Shape("modules of whole tiles", 16, 96, 256, slots=4, mixed=True, segments=(64, 32, 32)),
    Shape("modules within tiles", 5, 72, 90, rank=48, slots=4, layers=2, mixed=True, segments=(25, 12, 8)),
    Shape("prefill, modules across tiles", 300, 160, 200, rank=80, slots=3, mixed=True, segments=(100, 100)),
)


def make_call(shape: Shape, seed: int = 0) -> LoRAMatmulCall:
    """Return a call of ``shape``, drawn on the device.

    Of the modules the first has the rank of its entry, the others half of it.
    """
    keys, dtype, entries = jax.random.split(jax.random.key(seed), 5), jnp.dtype(shape.dtype), shape.layers * shape.slots
    x = jax.random.normal(keys[0], (shape.tokens, shape.k), dtype)
    ranks = jnp.full(entries, shape.rank, jnp.int32)
    if shape.mixed:
        ranks = jnp.maximum(8, shape.rank - 24 * (jnp.arange(entries, dtype=jnp.int32) % 3))
    own = jnp.where(jnp.arange(shape.modules) > 0, ranks[:, None] // 2, ranks[:, None])
    within = jnp.arange(shape.rank) < own[..., None]
    columns = within[:, np.resize(np.repeat(np.arange(shape.modules), shape.segments or shape.n), shape.n)]
    a = jax.random.normal(keys[1], (entries, shape.k, shape.modules * shape.rank), dtype)
    b = jax.random.normal(keys[2], (entries, shape.rank, shape.n), dtype)
    a = jnp.where(within.reshape(entries, 1, -1), a * jnp.asarray(shape.k**-0.5, dtype), jnp.zeros((), dtype))
    b = jnp.where(columns.swapaxes(1, 2), b, jnp.zeros((), dtype))
    mine = entries - 1 - jax.random.permutation(keys[3], shape.slots)
    candidates = jnp.where(jnp.arange(shape.slots) < shape.slots - shape.mixed, mine, -1).astype(jnp.int32)
    return LoRAMatmulCall(x, a, b, candidates[_slots(shape, keys[4])], candidates, ranks, segments=shape.segments)


def _slots(shape: Shape, key: jax.Array) -> jax.Array:
    """The place among the candidates of each token's adapter; that of an empty slot, the last, for tokens without."""
    turn = jnp.arange(shape.tokens) // (1 if shape.phase == "decode" else RUN)
    slot = jax.random.permutation(key, turn) % shape.used if shape.phase == "decode" else turn % shape.used
    return jnp.where(turn % 5 == 3, shape.slots - 1, slot) if shape.mixed else slot


def cost(shape: Shape) -> tuple[int, int]:
    """(bytes that must move, floating-point operations)."""
    width = shape.modules * shape.k + shape.n
    floats = shape.tokens * (shape.k + shape.n) + shape.used * shape.rank * width
    return jnp.dtype(shape.dtype).itemsize * floats, 2 * shape.tokens * shape.rank * width


def tiles_for(shape: Shape, device: str) -> Tiles:
    """The tiles that a call takes on a device of ``pallas_kernels.offline.DEVICES``."""
    return choose(shape.problem, DEVICES[device].target)


def key_for(shape: Shape) -> str:
    """Its name in the tuning table."""
    return shape.problem.key


def candidates_for(shape: Shape) -> Iterator[Tiles]:
    """The tiles worth timing."""
    return candidates(shape.problem, current_target().cores or 1)


def elements_per_trip(shape: Shape, tiles: Tiles) -> int:
    """Elements of an adapter that a step of the first kernel multiplies. A few steps make no loop to count."""
    return tiles.tile_k * tile_r(shape.modules * shape.rank)
