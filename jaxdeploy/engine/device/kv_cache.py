"""The memory plan of the KV cache, and the allocation of its pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.config import EngineConfig
from jaxdeploy.errors import CacheTooSmallError
from jaxdeploy.models.cache_layout import CacheDtype, CacheLayout, PoolArray
from jaxdeploy.parallel.mesh import on_cpu
from jaxdeploy.parallel.sharding import sharding_of

MAX_CPU_BYTES = 1 << 30
"""Maximum bytes of KV cache on a CPU without an explicit block count. Free memory is no measure there."""

MEMINFO = Path("/proc/meminfo")
HOST_SHARE = 0.25
"""Share of the free host memory that evicted blocks may take, without an explicit count."""
MAX_HOST_RATIO = 4
"""Maximum host blocks for each device block. Older blocks are rarely used again."""

Pools = tuple[Any, ...]
"""The pool of each layer."""


@dataclass(frozen=True)
class CachePlan:
    """The number of KV blocks and their bytes.

    Attributes:
        num_blocks: blocks on the device.
        block_size: tokens in a block.
        block_bytes: bytes of a block on each device.
        reason: how ``num_blocks`` was found, for the log.
        bits: bits of a quantised element, ``None`` for floats.
        host_blocks: blocks in host memory.
        host_block_bytes: bytes of a block in host memory.
        notes: remarks of the layouts.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    reason: str
    bits: int | None = None
    host_blocks: int = 0
    host_block_bytes: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = _size(self.num_blocks * self.block_bytes)
        tokens = self.num_blocks * self.block_size
        kind = f"int{self.bits} KV cache" if self.bits else "KV cache"
        host_size = _size(self.host_blocks * self.host_block_bytes)
        host = f"; {self.host_blocks} more on the host, {host_size}" if self.host_blocks else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{kind}: {self.num_blocks} blocks of {self.block_size} tokens = {tokens} tokens, "
            f"{_size(self.block_bytes)} a block, {size} in all ({self.reason}){host}{notes}"
        )


def plan_cache(
    layouts: Sequence[CacheLayout],
    config: EngineConfig,
    mesh: Mesh,
    *,
    session_len: int,
    max_batch_size: int,
    dtype: CacheDtype,
    draft_layouts: Sequence[CacheLayout] = (),
) -> CachePlan:
    """Return the number of blocks and their bytes, for pools of ``layouts`` and ``dtype``.

    Blocks of the draft model (``draft_layouts``) have the same numbers and no copy in host memory.

    An explicit count wins. Otherwise a GPU gives the share ``cache_max_entry_count`` of the memory that is free after
    the weights. A CPU gives the blocks of ``max_batch_size`` sequences of ``session_len`` tokens, at most
    ``MAX_CPU_BYTES`` bytes.

    Raises:
        CacheTooSmallError: one sequence of ``session_len`` tokens does not fit.
    """
    whole = sum(layout.bytes_per_block(config.block_size, dtype) for layout in layouts)
    every = (*layouts, *draft_layouts)
    size = sum(layout.bytes_per_block(config.block_size, dtype, mesh) for layout in every)
    per_sequence = -(-session_len // config.block_size)
    count, reason = _count_blocks(config, mesh, size, per_sequence * max_batch_size)
    if count < per_sequence:
        raise CacheTooSmallError(
            f"session_len={session_len} needs {per_sequence} KV blocks of {config.block_size} tokens "
            f"({per_sequence} x {_size(size)} = {_size(per_sequence * size)}), but there are {count} "
            f"({reason}); lower session_len, or give the cache more room with cache_max_entry_count or num_blocks"
        )
    host_blocks = _count_host_blocks(config, mesh, whole, count)
    notes = tuple(dict.fromkeys(note for layout in every if (note := layout.note())))
    return CachePlan(count, config.block_size, size, reason, dtype.bits, host_blocks, whole, notes)


def allocate_pools(
    layouts: Sequence[CacheLayout],
    plan: CachePlan,
    mesh: Mesh,
    dtype: CacheDtype,
    ranges: Sequence[Any] | None = None,
) -> Pools:
    """Return the pool of each layer, with its initial content.

    ``ranges`` holds a result of ``CacheLayout.ranges`` for each layer: the pools are then calibrated.
    """

    @cache
    def program(shape: tuple[int, ...], dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Callable[[Any], jax.Array]:
        return jax.jit(
            lambda fill: jnp.broadcast_to(jnp.asarray(fill).astype(dtype), shape),
            out_shardings=sharding_of(mesh, axes, shape),
        )

    def allocated(array: PoolArray) -> jax.Array:
        return program(array.shape, array.dtype, array.axes)(array.fill)

    each = [None] * len(layouts) if ranges is None else ranges
    pools = [
        layout.pool(plan.num_blocks, plan.block_size, dtype, of_layer)
        for layout, of_layer in zip(layouts, each, strict=True)
    ]
    return tuple(jax.tree.map(allocated, pool) for pool in pools)


def _count_blocks(config: EngineConfig, mesh: Mesh, size: int, full_batch: int) -> tuple[int, str]:
    if config.num_blocks:
        return config.num_blocks, "num_blocks, as asked"
    if isinstance(config.cache_max_entry_count, int):
        return config.cache_max_entry_count, "cache_max_entry_count, as asked"
    free = [_free_bytes(device) for device in mesh.local_devices]
    if None in free:
        count = min(full_batch, MAX_CPU_BYTES // size)
        return count, f"max_batch_size x session_len = {full_batch} blocks, at most {_size(MAX_CPU_BYTES)} on CPU"
    least = min(left for left in free if left is not None)
    share = config.cache_max_entry_count
    return int(least * share) // size, f"{share:g} of {_size(least)} free after weights on each device"


def _count_host_blocks(config: EngineConfig, mesh: Mesh, size: int, num_blocks: int) -> int:
    """Return the number of host blocks of ``size`` bytes for ``num_blocks`` device blocks."""
    if config.num_cpu_blocks is not None:
        return config.num_cpu_blocks
    if not config.enable_prefix_caching or on_cpu(mesh):
        return 0
    return min(int(_free_host_bytes() * HOST_SHARE) // size, MAX_HOST_RATIO * num_blocks)


def _free_host_bytes() -> int:
    """Return the free host memory in bytes, or 0 if the system does not report it."""
    if not MEMINFO.is_file():
        return 0
    entries = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(entries.get("MemAvailable", "0 kB").split()[0]) << 10


def _free_bytes(device: jax.Device) -> int | None:
    """Return the free device memory in bytes, or ``None`` if the platform does not report it (CPU)."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    return None if stats is None else int(stats["bytes_limit"]) - int(stats["bytes_in_use"])


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.2f} KiB"
