"""Where evicted KV blocks go: host memory, where the oldest are given up when none is free. What is to be copied."""

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
    """Hands out ``num_blocks`` blocks of host memory, each for the content of one of the device.

    Content that was brought back to the device stays here too, so that evicting it again costs no copy. ``on_drop``
    hears of nodes that lose their block here. The device must carry out transfers in their order, and before the step
    that was scheduled with them.
    """

    def __init__(self, num_blocks: int, on_drop: Callable[[Node], None]) -> None:
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._transfers: list[Transfer] = []
        self._on_drop = on_drop

    @property
    def used(self) -> int:
        """Blocks that hold something."""
        return self.num_blocks - len(self._free)

    def save(self, node: Node, block: int) -> None:
        """Copy ``block``, which is about to be overwritten, for ``node``, unless it has one."""
        if node.host_block is None and (here := self._take()) is not None:
            self._transfers.append(Transfer(block, here, to_device=False))
            node.host_block = here
            self._nodes[here] = node

    def restore(self, node: Node, block: int) -> None:
        """Copy what is kept of ``node`` to ``block``."""
        assert node.host_block is not None, "only what is kept here can be restored"
        self._transfers.append(Transfer(block, node.host_block, to_device=True))

    def discard(self, node: Node) -> None:
        """Give up what is kept of ``node``, if anything is."""
        if node.host_block is not None:
            del self._nodes[node.host_block]
            self._free.append(node.host_block)
            node.host_block = None

    def close(self) -> None:
        """Keep nothing from now on; to be called while nothing is kept."""
        assert not self.used, "what is kept would be lost"
        self.num_blocks, self._free = 0, []

    @contextmanager
    def pinned(self, nodes: Iterable[Node]) -> Iterator[None]:
        """While this lasts nobody takes the blocks of ``nodes``; afterwards they are the newest."""
        blocks = {node.host_block: self._nodes.pop(node.host_block) for node in nodes if node.host_block is not None}
        yield
        self._nodes.update(blocks)

    def transfers(self) -> list[Transfer]:
        """What is to be copied, once."""
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
        here, node = self._nodes.popitem(last=False)
        node.host_block = None
        self._on_drop(node)
        return here
