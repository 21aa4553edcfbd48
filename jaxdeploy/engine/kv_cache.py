"""How many KV blocks there are, with the arithmetic to print, and the pools that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.config import EngineConfig
from jaxdeploy.errors import CacheTooSmallError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.parallel.sharding import POOL_AXES, sharding_of

CPU_LIMIT = 1 << 30
"""Most bytes of KV cache on a CPU unless a block count is given: free memory says little there."""


@dataclass(frozen=True)
class CachePlan:
    """``num_blocks`` blocks of ``block_size`` tokens, ``block_bytes`` bytes each on one device, and why so many."""

    num_blocks: int
    block_size: int
    block_bytes: int
    reason: str

    def __str__(self) -> str:
        size = _size(self.num_blocks * self.block_bytes)
        tokens = self.num_blocks * self.block_size
        return (
            f"KV cache: {self.num_blocks} blocks of {self.block_size} tokens = {tokens} tokens, "
            f"{_size(self.block_bytes)} a block, {size} in all ({self.reason})"
        )


def plan_cache(
    model: ModelConfig, config: EngineConfig, mesh: Mesh, *, session_len: int, max_batch_size: int, dtype: jnp.dtype
) -> CachePlan:
    """Decide the number of blocks.

    An explicit count wins; else ``cache_max_entry_count`` of the device memory that is free now (the weights are
    loaded); on CPU what ``max_batch_size`` sequences of ``session_len`` tokens need, up to ``CPU_LIMIT`` bytes.

    Raises:
        CacheTooSmallError: one sequence of ``session_len`` tokens does not fit; the message shows the arithmetic.
    """
    block_bytes = _block_bytes(model, config.block_size, dtype) // mesh.size
    per_sequence = -(-session_len // config.block_size)
    count, reason = _count_blocks(config, mesh, block_bytes, per_sequence * max_batch_size)
    if count < per_sequence:
        raise CacheTooSmallError(
            f"session_len={session_len} needs {per_sequence} KV blocks of {config.block_size} tokens "
            f"({per_sequence} x {_size(block_bytes)} = {_size(per_sequence * block_bytes)}), but there are {count} "
            f"({reason}); lower session_len, or give the cache more room with cache_max_entry_count or num_blocks"
        )
    return CachePlan(count, config.block_size, block_bytes, reason)


def allocate_pools(model: ModelConfig, plan: CachePlan, mesh: Mesh, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """One zeroed pool [P, 2, K, S, H] a layer, cut along K."""
    shape = (plan.num_blocks, 2, model.num_kv_heads, plan.block_size, model.head_dim)
    sharding = sharding_of(mesh, POOL_AXES, shape)
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return tuple(zeros() for _ in range(model.num_layers))


def _block_bytes(model: ModelConfig, block_size: int, dtype: jnp.dtype) -> int:
    """Keys and values of ``block_size`` tokens in every layer, on all devices together."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * block_size * dtype.itemsize


def _count_blocks(config: EngineConfig, mesh: Mesh, block_bytes: int, wanted: int) -> tuple[int, str]:
    if config.num_blocks:
        return config.num_blocks, "num_blocks, as asked"
    if isinstance(config.cache_max_entry_count, int):
        return config.cache_max_entry_count, "cache_max_entry_count, as asked"
    free = [_free_bytes(device) for device in mesh.local_devices]
    if None in free:
        count = min(wanted, CPU_LIMIT // block_bytes)
        return count, f"max_batch_size x session_len = {wanted} blocks, at most {_size(CPU_LIMIT)} on CPU"
    least = min(size for size in free if size is not None)
    share = config.cache_max_entry_count
    return int(least * share) // block_bytes, f"{share:g} of {_size(least)} free after weights on each device"


def _free_bytes(device: jax.Device) -> int | None:
    """Device memory that is free now, in bytes; ``None`` where the platform does not say (CPU)."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    return None if stats is None else int(stats["bytes_limit"]) - int(stats["bytes_in_use"])


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.2f} KiB"
