"""Where evicted KV blocks go: slots in host memory, the oldest given up when none is free; and what is to be copied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxdeploy.engine.sequence import Node


@dataclass(frozen=True, slots=True)
class Transfer:
    """A copy of block ``block`` to the host's ``slot``, or back where ``to_device``."""

    block: int
    slot: int
    to_device: bool


class HostTier:
    """Hands out ``num_slots`` slots, each for the content of one block.

    Content that was brought back to the device stays here too, so that evicting it again costs no copy. ``on_drop``
    hears of nodes that lose their slot. The device must carry out transfers in their order, and before the step that
    was scheduled with them.
    """

    def __init__(self, num_slots: int, on_drop: Callable[[Node], None]) -> None:
        self.num_slots = num_slots
        self._free = list(reversed(range(num_slots)))
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._transfers: list[Transfer] = []
        self._on_drop = on_drop

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return self.num_slots - len(self._free)

    def save(self, node: Node, block: int) -> None:
        """Copy ``block``, which is about to be overwritten, to a slot for ``node``, unless it has one."""
        if node.slot is None and (slot := self._take()) is not None:
            self._transfers.append(Transfer(block, slot, to_device=False))
            node.slot = slot
            self._nodes[slot] = node

    def restore(self, node: Node, block: int) -> None:
        """Copy what is kept of ``node`` to ``block``."""
        assert node.slot is not None, "only what is kept here can be restored"
        self._transfers.append(Transfer(block, node.slot, to_device=True))

    def close(self) -> None:
        """Keep nothing from now on; to be called while nothing is kept."""
        assert not self.used, "what is kept would be lost"
        self.num_slots, self._free = 0, []

    @contextmanager
    def pinned(self, nodes: Iterable[Node]) -> Iterator[None]:
        """While this lasts nobody takes the slots of ``nodes``; afterwards they are the newest."""
        slots = {node.slot: self._nodes.pop(node.slot) for node in nodes if node.slot is not None}
        yield
        self._nodes.update(slots)

    def transfers(self) -> list[Transfer]:
        """What is to be copied, once."""
        transfers, self._transfers = self._transfers, []
        return transfers

    def check(self, nodes: list[Node]) -> None:
        """Assert that the slots in use are those of ``nodes``."""
        assert {node.slot: node for node in nodes} == self._nodes, "a slot is lost, or has two nodes"
        assert len(nodes) == self.used, "a slot is free and in use"

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._nodes:
            return None
        slot, node = self._nodes.popitem(last=False)
        node.slot = None
        self._on_drop(node)
        return slot
