"""Host memory for evicted KV blocks: which blocks it holds, and the copies that are to be made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxdeploy.engine.scheduling.blocks import Node


@dataclass(frozen=True, slots=True)
class Transfer:
    """A copy of block ``block`` to the host's ``host_block``, or back where ``to_device``."""

    block: int
    host_block: int
    to_device: bool


class HostTier:
    """Hands out ``num_blocks`` blocks of host memory, each for the content of one device block.

    If none is free, the oldest is given up, and ``on_drop`` is called with its node. Content that was copied back to
    the device stays here too, so that evicting it again needs no copy. The device must carry out transfers in their
    order, and before the step that was scheduled with them.
    """

    def __init__(self, num_blocks: int, on_drop: Callable[[Node], None]) -> None:
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._transfers: list[Transfer] = []
        self._on_drop = on_drop

    @property
    def used(self) -> int:
        """Number of blocks in use."""
        return self.num_blocks - len(self._free)

    def save(self, node: Node, block: int) -> None:
        """Copy ``block`` of the device for ``node``, unless there is a copy. The block is about to be overwritten."""
        if node.host_block is None and (host_block := self._take()) is not None:
            self._transfers.append(Transfer(block, host_block, to_device=False))
            node.host_block = host_block
            self._nodes[host_block] = node

    def restore(self, node: Node, block: int) -> None:
        """Copy the content of ``node`` to ``block`` of the device."""
        assert node.host_block is not None, "only content in host memory can be restored"
        self._transfers.append(Transfer(block, node.host_block, to_device=True))

    def discard(self, node: Node) -> None:
        """Free the block of ``node``, if it has one."""
        if node.host_block is not None:
            del self._nodes[node.host_block]
            self._free.append(node.host_block)
            node.host_block = None

    def close(self) -> None:
        """Turn host memory off. It must be empty."""
        assert not self.used, "the content in host memory would be lost"
        self.num_blocks, self._free = 0, []

    @contextmanager
    def pinned(self, nodes: Iterable[Node]) -> Iterator[None]:
        """Protect the blocks of ``nodes`` from being given up in the ``with`` block. Afterwards they are the newest."""
        blocks = {node.host_block: self._nodes.pop(node.host_block) for node in nodes if node.host_block is not None}
        yield
        self._nodes.update(blocks)

    def transfers(self) -> list[Transfer]:
        """Return the copies to be made, once."""
        transfers, self._transfers = self._transfers, []
        return transfers

    def check(self, nodes: list[Node]) -> None:
        """Assert that the blocks in use are those of ``nodes``."""
        assert {node.host_block: node for node in nodes} == self._nodes, "a block is lost, or has two nodes"
        assert len(nodes) == self.used, "a block is free and in use"

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._nodes:
            return None
        host_block, node = self._nodes.popitem(last=False)
        node.host_block = None
        self._on_drop(node)
        return host_block
