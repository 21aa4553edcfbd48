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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dispatch import dispatch

CACHE_BYTES = 256 * 2**20
"""What the arrays of a program exceed together: a few times the largest L2 cache (126 MB on a B200)."""

MAX_CALLS = 64
"""Calls in a program. Where even these fit into a cache, the kernel is timed as its arrays are in use: cached."""

SAMPLE_SECONDS = 0.02
_WARM_UP = 4  # XLA records a CUDA graph some runs after the first

Carry = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]
"""(arguments, result) → arguments of the next call, for ops that update an argument or are used in a chain."""


@dataclass(frozen=True)
class Op:
    """An op of ``pallas_kernels`` and its shapes."""

    name: str

    def __str__(self) -> str:
        return self.name

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
        """Return ``carry`` of its shapes if they have one, as a function of the arguments."""
        next_call = getattr(self.shapes, "carry", None)
        return None if next_call is None else lambda args, out: (next_call(*args, out),)

    def arguments(self, shape: Any, count: int | None = None) -> list[tuple[Any, ...]]:
        """Return ``count`` calls, each the one argument of ``function``; by default as many as exceed the caches."""

        def make(seed: Any) -> Any:
            return (self.shapes.make_call(shape, seed),)

        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make, 0)))
        made = jax.jit(make)
        return [made(seed) for seed in range(calls(nbytes) if count is None else count)]

    def function(self, backend: str, **options: Any) -> Callable[..., Any]:
        """Return the op on ``backend``, a function of a call."""
        return partial(dispatch, backend=backend, **options)


def calls(nbytes: int) -> int:
    """Calls in a program, each of which has arguments of ``nbytes``."""
    if not on_gpu():
        return 2
    return min(MAX_CALLS, max(2, math.ceil(CACHE_BYTES / nbytes)))


def on_gpu() -> bool:
    """Whether JAX computes on a GPU here."""
    return jax.default_backend() == "gpu"


class Program:
    """``function`` once for each of ``arguments``, compiled as one.

    With a ``carry`` the arrays are donated and ``arguments`` replaced by what comes back: programs may share a list.
    ``options`` are XLA's.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: list[tuple[Any, ...]],
        carry: Carry | None = None,
        options: dict[str, str | bool] | None = None,
    ) -> None:
        call = jax.jit(function)

        def run(sets: list[tuple[Any, ...]]) -> list[Any]:
            return [carry(args, call(*args)) if carry else call(*args) for args in sets]

        self._jitted = jax.jit(run, donate_argnums=(0,) if carry else ())
        self._options = options
        self._compiled: Callable[..., Any] | None = None
        self._arguments, self._carried, self._starts = arguments, carry is not None, 0

    def compile(self) -> None:
        """Compile it; touches no array, so that threads may do it for several programs."""
        self._compiled = self._jitted.lower(self._arguments).compile(self._options)

    def run(self) -> list[Any]:
        """Start it once, without waiting; the result of each call, or its carried arguments."""
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        results: list[Any] = self._compiled(self._arguments)
        if self._carried:
            self._arguments[:] = results
        return results

    def first(self) -> Any:
        """A copy of the first call's result."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.run()[0]))

    def sample(self) -> float:
        """Seconds that a call took; the first sample warms up, and finds out how many starts make one long enough."""
        if not self._starts:
            for _ in range(_WARM_UP):
                jax.block_until_ready(self.run())
            self._starts = max(1, math.ceil(SAMPLE_SECONDS / self._elapsed(1)))
        return self._elapsed(self._starts) / (self._starts * len(self._arguments))

    def _elapsed(self, starts: int) -> float:
        start = time.perf_counter()
        for _ in range(starts):
            results = self.run()
        jax.block_until_ready(results)
        return time.perf_counter() - start


def prepare(programs: Mapping[str, Program], threads: int) -> dict[str, Exception]:
    """Compile ``threads`` programs at a time, then sample each once; name → exception of those that failed."""

    def attempt(step: Callable[[], Any]) -> Exception | None:
        try:
            step()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(threads) as pool:
        outcomes = dict(zip(programs, pool.map(attempt, [p.compile for p in programs.values()]), strict=True))
    for name, program in programs.items():
        outcomes[name] = outcomes[name] or attempt(program.sample)
    return {name: error for name, error in outcomes.items() if error is not None}


def take_turns(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each program, in seconds per call."""
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            samples[name].append(program.sample())
    return samples


def ceilings(
    rounds: int, *, nbytes: int = 2**32, side: int = 8192, dtype: DTypeLike = jnp.bfloat16
) -> dict[str, float]:
    """What this device reaches: bytes/s of a large copy, read and written; operations/s of a square matrix product."""
    keys = jax.random.split(jax.random.key(0), 3)
    source = jax.random.bits(keys[0], (nbytes // 4,), jnp.uint32)
    factors = [jax.random.normal(key, (side, side), dtype) for key in keys[1:]]
    programs = {
        "copy_bytes_s": Program(jnp.copy, [(source,)]),
        "matmul_flop_s": Program(jnp.dot, [(factors[0], factors[1])]),
    }
    samples = take_turns(programs, rounds)
    work = {"copy_bytes_s": 2 * nbytes, "matmul_flop_s": 2 * side**3}
    return {name: work[name] / statistics.median(seconds) for name, seconds in samples.items()}
