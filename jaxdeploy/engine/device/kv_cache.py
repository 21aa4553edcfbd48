"""How many KV blocks there are, with the arithmetic to print, and the pools that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.kv_policy import Ranges
from jaxdeploy.errors import CacheTooSmallError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.parallel.mesh import TP_AXIS, axis_size
from jaxdeploy.parallel.sharding import POOL_AXES, sharding_of
from pallas_kernels.kv_pool import Pool, QuantizedPool

CPU_LIMIT = 1 << 30
"""Most bytes of KV cache on a CPU unless a block count is given: free memory says little there."""

MEMINFO = Path("/proc/meminfo")
HOST_SHARE = 0.25
"""Share of the host memory free at start that evicted blocks may take, unless a count is given."""
MOST_ON_HOST = 4
"""Most blocks there for each on the device: what is found in more is rarely asked for again."""

UNIT_RANGE = np.array([[1], [0]], np.float16)
"""Scale and zero of a token that was never written, [2, 1]."""


@dataclass(frozen=True)
class CachePlan:
    """``num_blocks`` blocks of ``block_size`` tokens, ``block_bytes`` bytes each on one device, and why so many.

    ``bits`` are those of a quantised element, 8 or 4; ``None`` stores floats. ``host_blocks`` more are kept in host
    memory, ``host_block_bytes`` bytes each.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    reason: str
    bits: int | None = None
    host_blocks: int = 0
    host_block_bytes: int = 0

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take up."""
        return -(-tokens // self.block_size)

    def __str__(self) -> str:
        size = _size(self.num_blocks * self.block_bytes)
        tokens = self.num_blocks * self.block_size
        kind = f"int{self.bits} KV cache" if self.bits else "KV cache"
        there = _size(self.host_blocks * self.host_block_bytes)
        host = f"; {self.host_blocks} more on the host, {there}" if self.host_blocks else ""
        return (
            f"{kind}: {self.num_blocks} blocks of {self.block_size} tokens = {tokens} tokens, "
            f"{_size(self.block_bytes)} a block, {size} in all ({self.reason}){host}"
        )


def plan_cache(
    model: ModelConfig,
    config: EngineConfig,
    mesh: Mesh,
    *,
    session_len: int,
    max_batch_size: int,
    dtype: jnp.dtype,
    bits: int | None = None,
    beside: int = 0,
) -> CachePlan:
    """Decide the number of blocks, of floats of ``dtype`` or of integers of ``bits``.

    A block holds ``beside`` bytes more, for a model that guesses.

    An explicit count wins; else ``cache_max_entry_count`` of the device memory that is free now (the weights are
    loaded); on CPU what ``max_batch_size`` sequences of ``session_len`` tokens need, up to ``CPU_LIMIT`` bytes.

    Raises:
        CacheTooSmallError: one sequence of ``session_len`` tokens does not fit; the message shows the arithmetic.
    """
    whole = block_bytes(model, config.block_size, dtype, bits)
    size = (whole + beside) // axis_size(mesh, TP_AXIS)
    per_sequence = -(-session_len // config.block_size)
    count, reason = _count_blocks(config, mesh, size, per_sequence * max_batch_size)
    if count < per_sequence:
        raise CacheTooSmallError(
            f"session_len={session_len} needs {per_sequence} KV blocks of {config.block_size} tokens "
            f"({per_sequence} x {_size(size)} = {_size(per_sequence * size)}), but there are {count} "
            f"({reason}); lower session_len, or give the cache more room with cache_max_entry_count or num_blocks"
        )
    return CachePlan(
        count, config.block_size, size, reason, bits, _count_host_blocks(config, mesh, whole, count), whole
    )


def allocate_pools(
    model: ModelConfig, plan: CachePlan, mesh: Mesh, dtype: jnp.dtype, ranges: Ranges | None = None
) -> tuple[Pool, ...]:
    """Return one pool [P, 2, K, S, H] per layer, cut along K: of ``dtype``, or quantised to ``plan.bits``.

    Elements and zeros are 0. Scales are 1: kernels divide by the scale of every token of a block, also of tokens
    that were never written. With ``ranges`` the pools are calibrated and hold these scales and zeros.
    """
    shape = (plan.num_blocks, 2, model.num_kv_heads, plan.block_size, model.head_dim)
    if plan.bits is None:
        zeros = _filled(shape, dtype, mesh)
        return tuple(zeros(0) for _ in range(model.num_layers))
    values = _filled((*shape[:-1], _stored_width(model, plan.bits)), jnp.dtype(jnp.uint8), mesh)
    scales = _filled((*shape[:3], 2, plan.block_size), jnp.dtype(jnp.float16), mesh)
    filling = [UNIT_RANGE] * model.num_layers
    if ranges is not None:
        filling = [layer[None, ..., None] for layer in ranges]
    return tuple(QuantizedPool(values(0), scales(fill), calibrated=ranges is not None) for fill in filling)


def _filled(shape: tuple[int, ...], dtype: jnp.dtype, mesh: Mesh) -> Callable[[Any], jax.Array]:
    """From a value, or what broadcasts to ``shape``, to an array of it that lies where pools do."""
    return jax.jit(
        lambda fill: jnp.broadcast_to(jnp.asarray(fill).astype(dtype), shape),
        out_shardings=sharding_of(mesh, POOL_AXES, shape),
    )


def block_bytes(model: ModelConfig, block_size: int, dtype: jnp.dtype, bits: int | None = None) -> int:
    """Keys and values of ``block_size`` tokens in every layer, on all devices together.

    A vector of ``bits`` has a float16 scale and zero beside it.
    """
    vector = model.head_dim * dtype.itemsize if bits is None else _stored_width(model, bits) + 2 * 2
    return 2 * model.num_layers * model.num_kv_heads * block_size * vector


def _stored_width(model: ModelConfig, bits: int) -> int:
    """Bytes of a quantised vector."""
    return model.head_dim * bits // 8


def _count_blocks(config: EngineConfig, mesh: Mesh, size: int, wanted: int) -> tuple[int, str]:
    if config.num_blocks:
        return config.num_blocks, "num_blocks, as asked"
    if isinstance(config.cache_max_entry_count, int):
        return config.cache_max_entry_count, "cache_max_entry_count, as asked"
    free = [_free_bytes(device) for device in mesh.local_devices]
    if None in free:
        count = min(wanted, CPU_LIMIT // size)
        return count, f"max_batch_size x session_len = {wanted} blocks, at most {_size(CPU_LIMIT)} on CPU"
    least = min(left for left in free if left is not None)
    share = config.cache_max_entry_count
    return int(least * share) // size, f"{share:g} of {_size(least)} free after weights on each device"


def _count_host_blocks(config: EngineConfig, mesh: Mesh, size: int, num_blocks: int) -> int:
    """Blocks of ``size`` bytes that the host keeps beside ``num_blocks`` on the device."""
    if config.num_cpu_blocks is not None:
        return config.num_cpu_blocks
    if not config.enable_prefix_caching or _on_cpu(mesh):
        return 0
    return min(int(_free_host_bytes() * HOST_SHARE) // size, MOST_ON_HOST * num_blocks)


def _on_cpu(mesh: Mesh) -> bool:
    """Where the device's memory is the host's."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def _free_host_bytes() -> int:
    """Host memory that is free now, in bytes; 0 where the system does not say."""
    if not MEMINFO.is_file():
        return 0
    entries = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(entries.get("MemAvailable", "0 kB").split()[0]) << 10


def _free_bytes(device: jax.Device) -> int | None:
    """Device memory that is free now, in bytes; ``None`` where the platform does not say (CPU)."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats()
    return None if stats is None else int(stats["bytes_limit"]) - int(stats["bytes_in_use"])


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.2f} KiB"
