"""How warpgroups share a CTA: slots of shared memory that one fills and others empty, and the registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu
"""Untyped: what it has, and with which parameters, is not the same in any two releases."""


@dataclass(frozen=True)
class Ring:
    """``slots`` slots; step i uses slot i mod ``slots``. The filler and the readers count the same steps.

    Attributes:
        slots: how many there are.
        full: barriers [slots], completed by the copies into a slot.
        empty: barriers [slots], completed when every reader has released a slot.
    """

    slots: int
    full: Any
    empty: Any

    def fill(self, step: jax.Array, copy: Callable[[jax.Array, Any], None]) -> None:
        """Wait until the slot of ``step`` is free, then ``copy(slot, barrier)`` into it, signalling ``barrier``."""
        slot = self.slot(step)

        @pl.when(step >= self.slots)
        def _reuse() -> None:
            plgpu.barrier_wait(self.empty.at[slot])

        copy(slot, self.full.at[slot])

    def wait(self, step: jax.Array) -> jax.Array:
        """Wait until the slot of ``step`` is full, and return it."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, step: jax.Array) -> None:
        """Say that this reader is done with the slot of ``step``."""
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])

    def drain(self, steps: jax.Array) -> None:
        """Wait, as the filler of ``steps`` steps, for the last release of every slot: no barrier is left half-way."""
        for slot in range(self.slots):

            @pl.when(slot < steps)
            def _last(slot: int = slot) -> None:
                plgpu.barrier_wait(self.empty.at[slot])

    def slot(self, step: jax.Array) -> jax.Array:
        """Where the data of ``step`` lies."""
        return lax.rem(step, jnp.int32(self.slots))


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile with rows of ``columns`` elements lies in shared memory, so that wgmma and TMA can read it."""
    bits = 8 * jnp.dtype(dtype).itemsize
    width = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * width // bits)), plgpu.SwizzleTransform(width)


def give_registers(readers: int) -> None:
    """Of the warpgroup that only copies: leave registers to the ``readers`` that compute, which take them."""
    if readers > 1:
        plgpu.set_max_registers(_COPYING, action="decrease")


def take_registers(readers: int) -> None:
    """Of each of the ``readers`` that compute: take what the copying warpgroup leaves. One alone has enough."""
    if readers > 1:
        each = (_REGISTERS // (readers + 1) // 8 * 8 * (readers + 1) - _COPYING) // readers // 8 * 8
        plgpu.set_max_registers(each, action="increase")


_COPYING = 40
_REGISTERS = 512
"""Of a multiprocessor, for each of the 128 threads of its warpgroups, which get them in eights."""
