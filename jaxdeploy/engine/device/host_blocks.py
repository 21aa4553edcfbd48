"""The content of evicted KV blocks in host memory, and the programs that copy it there and back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeploy.engine.scheduling.host_tier import Transfer
from pallas_kernels.kv_pool import Pool, stored

GROUP = 8
"""Blocks that one launch copies. The rest of a smaller group is padding."""

Content = Any
"""A block of every layer: like a pool, but [L, 2, K, S, H]."""


class HostBlocks:
    """Pinned host memory for the content of blocks. Copies overlap with steps that run."""

    def __init__(self, pools: tuple[Pool, ...]) -> None:
        self._on_device = jax.tree.map(lambda array: array.sharding, pools[0])
        self._on_host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), self._on_device)
        self._held: dict[int, Content] = {}
        self._gather = jax.jit(_gather, out_shardings=(self._on_device,) * GROUP)
        self._scatter = jax.jit(_scatter, donate_argnums=0, out_shardings=(self._on_device,) * len(pools))

    def carry_out(self, pools: tuple[Pool, ...], transfers: Iterable[Transfer]) -> tuple[Pool, ...]:
        """Launch copies in their order; returns the pools, which were donated."""
        for to_device, group in groupby(transfers, key=lambda transfer: transfer.to_device):
            copies = list(group)
            for start in range(0, len(copies), GROUP):
                if to_device:
                    pools = self._restore(pools, copies[start : start + GROUP])
                else:
                    self._save(pools, copies[start : start + GROUP])
        return pools

    def clear(self) -> None:
        """Give the host memory back."""
        self._held.clear()

    def _save(self, pools: tuple[Pool, ...], copies: list[Transfer]) -> None:
        contents = self._gather(pools, _padded([copy.block for copy in copies], 0))
        for copy, content in zip(copies, contents, strict=False):
            self._held[copy.host_block] = jax.device_put(content, self._on_host)

    def _restore(self, pools: tuple[Pool, ...], copies: list[Transfer]) -> tuple[Pool, ...]:
        contents = [jax.device_put(self._held[copy.host_block], self._on_device) for copy in copies]
        contents += [contents[0]] * (GROUP - len(contents))
        nowhere = stored(pools[0]).shape[0]
        restored: tuple[Pool, ...] = self._scatter(pools, _padded([copy.block for copy in copies], nowhere), contents)
        return restored


def _padded(blocks: list[int], filling: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(blocks + [filling] * (GROUP - len(blocks)), np.int32)


def _gather(pools: tuple[Pool, ...], blocks: jax.Array) -> tuple[Content, ...]:
    """The content of each of ``blocks`` int32 [GROUP]."""

    def stacked(index: jax.Array, *layers: jax.Array) -> jax.Array:
        return jnp.stack([layer[index] for layer in layers])

    return tuple(jax.tree.map(partial(stacked, blocks[row]), *pools) for row in range(GROUP))


def _scatter(pools: tuple[Pool, ...], blocks: jax.Array, contents: list[Content]) -> tuple[Pool, ...]:
    """Put each of ``contents`` into its block; one that is beyond the pool goes nowhere."""

    def filled(layer: int, pool: jax.Array, *rows: jax.Array) -> jax.Array:
        return pool.at[blocks].set(jnp.stack([row[layer] for row in rows]), mode="drop")

    return tuple(jax.tree.map(partial(filled, layer), pool, *contents) for layer, pool in enumerate(pools))
