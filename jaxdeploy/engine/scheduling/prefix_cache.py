"""Finds KV blocks by their tokens and all tokens before them, so that prompts with equal beginnings share blocks."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.blocks import Block, Node, Start
from jaxdeploy.engine.scheduling.host_tier import HostTier, Transfer
from jaxdeploy.engine.scheduling.sequence import Sequence

_Key = tuple[Node | Start, tuple[int, ...]]
"""The block before, and the tokens in this one. A key thus determines salt, adapter and all tokens from the first."""


class PrefixCache:
    """Finds full blocks by their tokens. Hashes narrow the search, and tokens decide.

    A block is added as soon as a step is scheduled that fills it. Later sequences of the same step may attend to it,
    because a step writes all its keys and values before any attention. Blocks that the device evicts
    go to ``host_blocks`` in host memory and come back when they are found there.

    ``max_prompt_len``: only sequences with prompts of up to this length take part; 0 turns sharing off.
    """

    def __init__(
        self, blocks: BlockManager, block_size: int, max_prompt_len: int = sys.maxsize, host_blocks: int = 0
    ) -> None:
        self.asked = self.found = self.restored = 0
        self.host = HostTier(host_blocks, self._forget)
        self._blocks = blocks
        self._block_size = block_size
        self._max_prompt_len = max_prompt_len
        self._known: dict[_Key, Node] = {}
        self._on_device: dict[int, Node] = {}
        blocks.on_evict = self._evicted

    def serves(self, sequence: Sequence) -> bool:
        """Whether a sequence shares blocks with others."""
        return sequence.prompt_length <= self._max_prompt_len

    def find(self, sequence: Sequence) -> list[Node]:
        """Return the cached nodes of a sequence's first tokens, on device or host. At least one token is left."""
        chain: list[Node] = []
        if self.serves(sequence):
            for index in range((len(sequence.token_ids) - 1) // self._block_size):
                node = self._known.get(self._key(sequence, index, chain))
                if node is None:
                    break
                chain.append(node)
        return chain

    def bring(self, nodes: list[Node], missing: int) -> list[Block]:
        """Return the blocks of ``nodes``, then new ones. It allocates ``missing``; the caller holds the others already.

        Nodes without a block on the device take the first allocated ones and are restored from host memory.
        """
        with self.host.pinned(nodes):
            fresh = self._blocks.allocate(missing)
        blocks = []
        for node in nodes:
            block = node.block
            if block is None:
                block = fresh.pop(0)
                self._assign(node, block)
                self.host.restore(node, block.index)
                self.restored += 1
            blocks.append(block)
        return blocks + fresh

    def add(self, sequence: Sequence, full: int) -> None:
        """Let others find the first ``full`` blocks of a sequence.

        If another block has the same tokens already, the cache keeps that one.
        """
        placement = sequence.placement
        for index in range(len(placement.cached_nodes), full):
            key = self._key(sequence, index, placement.cached_nodes)
            node = self._known.setdefault(key, Node(*key))
            if node.block is None:
                self._assign(node, placement.blocks[index])
            placement.cached_nodes.append(node)

    def forget(self, indices: Iterable[int], nodes: Iterable[Node] = ()) -> None:
        """Remove the nodes of these blocks, and ``nodes``, with their copies in host memory."""
        known = [self._on_device.get(index) for index in indices]
        for node in (*filter(None, known), *nodes):
            if node.block is not None:
                del self._on_device[node.block.index]
                node.block = None
            self.host.discard(node)
            self._forget(node)

    def transfers(self) -> list[Transfer]:
        """Return copies between device and host that must run before the next step, in this order."""
        return self.host.transfers()

    def check(self) -> None:
        """Assert that all nodes and blocks are consistent."""
        nodes = list(self._known.values())
        on_device = {node.block.index: node for node in nodes if node.block is not None}
        assert all(self._known[node.before, node.tokens] is node for node in nodes), "a key leads to another node"
        assert all(self._blocks.is_valid(node.block) for node in on_device.values() if node.block), "a block was lost"
        assert on_device == self._on_device, "a block is known under two names, or is forgotten"
        self.host.check([node for node in nodes if node.host_block is not None])

    def _assign(self, node: Node, block: Block) -> None:
        """Record that ``block`` has the content of ``node``.

        The block may have had another node, whose predecessor has been forgotten, so that it cannot be found.
        """
        before = self._on_device.get(block.index)
        if before is not None:
            before.block = None
            self._forget(before)
        node.block, self._on_device[block.index] = block, node

    def _evicted(self, index: int) -> None:
        node = self._on_device.pop(index, None)
        if node is not None:
            node.block = None
            self.host.save(node, index)
            self._forget(node)

    def _forget(self, node: Node) -> None:
        """Remove a node that is neither on the device nor in host memory."""
        key = node.before, node.tokens
        if node.block is None and node.host_block is None and self._known.get(key) is node:
            del self._known[key]

    def _key(self, sequence: Sequence, index: int, before: list[Node]) -> _Key:
        tokens = sequence.token_ids[index * self._block_size : (index + 1) * self._block_size]
        return before[-1] if before else sequence.start, tuple(tokens)
