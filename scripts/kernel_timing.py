"""How long calls of a kernel take, for ``bench_kernels.py`` and ``tune_kernels.py``.

One call is too short to time by itself, and arrays that were just used may still be in a cache. So a program holds
several calls, each on arrays of its own that together are larger than the caches; it is started over and over without
waiting, until a sample is long enough. Programs to be compared take turns.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

CACHE_BYTES = 256 * 2**20
"""What the arrays of a program exceed together: a few times the largest L2 cache (126 MB on a B200)."""

MOST_CALLS = 64
"""Calls in a program. Where even these fit into a cache, the kernel is timed as its arrays are in use: cached."""

SAMPLE_SECONDS = 0.02
_WARM_UP = 4  # XLA records a CUDA graph some runs after the first

Carry = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]
"""(arguments, result) → arguments of the next call, for an op that updates an argument in place."""


@dataclass(frozen=True)
class Op:
    """An op of ``pallas_kernels`` and its shapes."""

    name: str

    @property
    def package(self) -> ModuleType:
        """``pallas_kernels.<op>``."""
        return importlib.import_module(f"pallas_kernels.{self.name}")

    @property
    def shapes(self) -> ModuleType:
        """``pallas_kernels.<op>.shapes``."""
        return importlib.import_module(f"pallas_kernels.{self.name}.shapes")

    @property
    def carry(self) -> Carry | None:
        """``carry`` of its shapes, for ops that update an argument in place."""
        return getattr(self.shapes, "carry", None)

    def arguments(self, shape: Any, count: int | None = None) -> list[tuple[Any, ...]]:
        """``count`` sets of arrays, as many as the caches ask for unless it is given."""

        def make(seed: Any) -> Any:
            return self.shapes.make_args(shape, seed)[0]

        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make, 0)))
        made = jax.jit(make)
        return [made(seed) for seed in range(calls(nbytes) if count is None else count)]

    def function(self, shape: Any, backend: str, **options: Any) -> Callable[..., Any]:
        """The op on ``backend`` with the keywords that ``shape`` asks for."""
        keywords: dict[str, Any] = {}
        jax.eval_shape(lambda: keywords.update(self.shapes.make_args(shape)[1]))
        op = getattr(self.package, self.name)
        return lambda *args: op(*args, **keywords, backend=backend, **options)


def calls(nbytes: int) -> int:
    """Calls in a program, each of which has arguments of ``nbytes``."""
    if not on_gpu():
        return 2
    return min(MOST_CALLS, max(2, math.ceil(CACHE_BYTES / nbytes)))


def on_gpu() -> bool:
    """Whether JAX computes on a GPU here."""
    return jax.default_backend() == "gpu"


class Program:
    """``function`` once for each of ``arguments``, compiled as one; call ``warm_up`` before the rest."""

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], carry: Carry | None = None
    ) -> None:
        call, self._arguments, self._carried = jax.jit(function), list(arguments), carry is not None

        def run(sets: list[tuple[Any, ...]]) -> list[Any]:
            return [carry(args, call(*args)) if carry else call(*args) for args in sets]

        self._run = jax.jit(run, donate_argnums=(0,) if carry else ())
        self._starts = 0
        if carry:  # donated, so this program needs arrays that are its own
            self._arguments = jax.tree.map(jnp.copy, self._arguments)

    def run(self) -> list[Any]:
        """Start it once, without waiting; the result of each call, or its carried arguments."""
        results: list[Any] = self._run(self._arguments)
        if self._carried:
            self._arguments = results
        return results

    def warm_up(self) -> Any:
        """Compile and run a few times; the result of the first call."""
        first = jax.tree.map(jnp.copy, jax.block_until_ready(self.run())[0])
        for _ in range(_WARM_UP if on_gpu() else 0):
            jax.block_until_ready(self.run())
        return first

    def sample(self) -> float:
        """Seconds that a call took; the first sample finds out how many starts make the next ones long enough."""
        start = time.perf_counter()
        for _ in range(self._starts or 1):
            results = self.run()
        jax.block_until_ready(results)
        seconds = (time.perf_counter() - start) / (self._starts or 1)
        self._starts = self._starts or max(1, math.ceil(SAMPLE_SECONDS / seconds))
        return seconds / len(self._arguments)


def compile_all(programs: Mapping[str, Program], threads: int) -> dict[str, Any]:
    """Warm all up, ``threads`` at a time; name → result of its first call, or the exception that it raised."""

    def attempt(program: Program) -> Any:
        try:
            return program.warm_up()
        except Exception as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(programs, pool.map(attempt, programs.values()), strict=True))


def take_turns(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each program, in seconds per call."""
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program.sample()
    for _ in range(rounds):
        for name, program in programs.items():
            samples[name].append(program.sample())
    return samples


def ceilings(rounds: int, tiny: bool) -> dict[str, float]:
    """What this device reaches: bytes/s of a large copy, read and written; operations/s of a bf16 matrix product."""
    nbytes, side = (2**20, 128) if tiny else (2**32, 8192)
    keys = jax.random.split(jax.random.key(0), 3)
    source = jax.random.bits(keys[0], (nbytes // 4,), jnp.uint32)
    factors = [jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys[1:]]
    programs = {
        "copy_bytes_s": Program(jnp.copy, [(source,)]),
        "matmul_flop_s": Program(jnp.dot, [(factors[0], factors[1])]),
    }
    for program in programs.values():
        program.warm_up()
    samples = take_turns(programs, rounds)
    work = {"copy_bytes_s": 2 * nbytes, "matmul_flop_s": 2 * side**3}
    return {name: work[name] / statistics.median(seconds) for name, seconds in samples.items()}
