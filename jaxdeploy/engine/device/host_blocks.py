"""The content of evicted KV blocks in host memory, and the programs that copy it from and to the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeploy.engine.scheduling.host_tier import Transfer
from jaxdeploy.models.cache_layout import num_blocks

GROUP = 8
"""Blocks that one launch copies. Smaller groups are padded."""

Pools = tuple[Any, ...]

Group = tuple[int, ...]
"""Indices of layers whose pools have equal shapes, dtypes and placement."""

Content = tuple[Any, ...]
"""One block: for each group a pool-like tree whose arrays have the layers of the group as first axis."""


class HostBlocks:
    """Pinned host memory for the content of blocks. Copies overlap with steps that run."""

    def __init__(self, pools: Pools) -> None:
        groups = _groups(pools)
        of_pools = jax.tree.map(lambda array: array.sharding, pools)
        self._on_device = tuple(of_pools[group[0]] for group in groups)
        self._on_host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), self._on_device)
        self._held: dict[int, Content] = {}
        self._gather = jax.jit(partial(_gather, groups), out_shardings=(self._on_device,) * GROUP)
        self._scatter = jax.jit(partial(_scatter, groups), donate_argnums=0, out_shardings=of_pools)

    def copy(self, pools: Pools, transfers: Iterable[Transfer]) -> Pools:
        """Launch the copies in their order. ``pools`` are donated; returns the new ones."""
        for to_device, run in groupby(transfers, key=lambda transfer: transfer.to_device):
            copies = list(run)
            for start in range(0, len(copies), GROUP):
                if to_device:
                    pools = self._restore(pools, copies[start : start + GROUP])
                else:
                    self._save(pools, copies[start : start + GROUP])
        return pools

    def clear(self) -> None:
        """Free the host memory."""
        self._held.clear()

    def _save(self, pools: Pools, copies: list[Transfer]) -> None:
        contents = self._gather(pools, _padded([copy.block for copy in copies], 0))
        for copy, content in zip(copies, contents, strict=False):
            self._held[copy.host_block] = jax.device_put(content, self._on_host)

    def _restore(self, pools: Pools, copies: list[Transfer]) -> Pools:
        contents = [jax.device_put(self._held[copy.host_block], self._on_device) for copy in copies]
        contents += [contents[0]] * (GROUP - len(contents))
        nowhere = num_blocks(pools[0])
        restored: Pools = self._scatter(pools, _padded([copy.block for copy in copies], nowhere), contents)
        return restored


def _groups(pools: Pools) -> tuple[Group, ...]:
    """Return the layers in groups, so that a copy has as few arrays as possible."""
    alike = defaultdict[Any, list[int]](list)
    for index, pool in enumerate(pools):
        arrays, tree = jax.tree.flatten(pool)
        alike[tree, tuple((array.shape, array.dtype, array.sharding) for array in arrays)].append(index)
    return tuple(map(tuple, alike.values()))


def _padded(blocks: list[int], filling: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(blocks + [filling] * (GROUP - len(blocks)), np.int32)


def _gather(groups: tuple[Group, ...], pools: Pools, blocks: jax.Array) -> tuple[Content, ...]:
    """Return the content of each of ``blocks``, int32 [GROUP]."""

    def stacked(index: jax.Array, *layers: jax.Array) -> jax.Array:
        return jnp.stack([layer[index] for layer in layers])

    def content(index: jax.Array) -> Content:
        return tuple(jax.tree.map(partial(stacked, index), *(pools[layer] for layer in group)) for group in groups)

    return tuple(content(blocks[row]) for row in range(GROUP))


def _scatter(groups: tuple[Group, ...], pools: Pools, blocks: jax.Array, contents: list[Content]) -> Pools:
    """Write each of ``contents`` to its block; blocks beyond the pools are ignored."""

    def filled(place: int, pool: jax.Array, *rows: jax.Array) -> jax.Array:
        return pool.at[blocks].set(jnp.stack([row[place] for row in rows]), mode="drop")

    restored = list(pools)
    for number, group in enumerate(groups):
        of_group = [content[number] for content in contents]
        for place, layer in enumerate(group):
            restored[layer] = jax.tree.map(partial(filled, place), pools[layer], *of_group)
    return tuple(restored)
