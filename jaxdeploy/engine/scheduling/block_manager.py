"""The state of every KV block: free, active (held by one or more sequences), or cached (not held, content valid)."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from jaxdeploy.engine.scheduling.blocks import Block


class OutOfBlocksError(Exception):
    """There are not enough free and cached blocks."""


class BlockManager:
    """Hands out ``num_blocks`` blocks. If none is free, it takes the block that has been cached the longest.

    ``on_evict`` is called with the index of a cached block before it is handed out.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] = _ignore
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._uses = [0] * num_blocks
        self._stamps = [0] * num_blocks
        self._tainted: set[int] = set()
        self._suspects: set[int] = set()
        self._unclean: list[int] = []

    @property
    def available(self) -> int:
        """Number of blocks that ``allocate`` can return now."""
        return len(self._free) + len(self._cached)

    @property
    def active(self) -> int:
        """Number of blocks that are held."""
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        """Number of blocks that are not held and have valid content."""
        return len(self._cached)

    def allocate(self, count: int) -> list[Block]:
        """Return ``count`` blocks, which the caller holds. Raises ``OutOfBlocksError`` if there are too few."""
        if count > self.available:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.available} available")
        return [self._take() for _ in range(count)]

    def release(self, blocks: Sequence[Block]) -> None:
        """Give back blocks whose content is not needed again: active → free."""
        for block in blocks:
            if self._drop(block):
                self._free.append(block.index)

    def retire(self, blocks: Sequence[Block]) -> None:
        """Give back blocks whose content may be needed again: active → cached.

        The last block is retired first, so that the end of a sequence is evicted before its beginning.
        """
        for block in reversed(blocks):
            if not self._drop(block):
                continue
            if block.index in self._tainted:
                self._free.append(block.index)
            else:
                self._cached[block.index] = None

    def taint(self, indices: Iterable[int]) -> None:
        """Mark blocks whose content is not finite. Nothing may use it, and it is cleared for the next holder.

        Current holders keep the blocks. The caller removes them from the prefix cache (``PrefixCache.forget``).
        """
        for index in indices:
            self._tainted.add(index)
            if index in self._cached:
                del self._cached[index]
                self._free.append(index)

    def suspect(self, indices: Iterable[int]) -> None:
        """Have these blocks cleared if they are handed out before ``trust``: a step that writes to them is running."""
        self._suspects.update(indices)

    def trust(self) -> None:
        """Suspect no block any more: the step has ended, and those that it left not finite are tainted."""
        self._suspects.clear()

    def unclean(self) -> list[int]:
        """Return, once, the blocks handed out since the last call that must be cleared before a step uses them."""
        unclean, self._unclean = self._unclean, []
        return unclean

    def is_valid(self, block: Block) -> bool:
        """Whether a block still has the content that it had when it was handed out as ``block``."""
        if block.index in self._tainted:
            return False
        return self._stamps[block.index] == block.stamp and (self._uses[block.index] > 0 or block.index in self._cached)

    def hold(self, blocks: Sequence[Block]) -> list[Block]:
        """Hold the longest prefix of ``blocks`` whose content is valid: cached → active, or active by one more."""
        held: list[Block] = []
        for block in blocks:
            if not self.is_valid(block):
                break
            self._cached.pop(block.index, None)
            self._uses[block.index] += 1
            held.append(block)
        return held

    def check(self) -> None:
        """Assert that every block is in exactly one state and that counts agree with it."""
        free, cached = set(self._free), set(self._cached)
        held = {index for index, uses in enumerate(self._uses) if uses}
        assert all(uses >= 0 for uses in self._uses), "a block was released more often than it was held"
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is in two states, or in none"
        assert free | cached | held == set(range(self.num_blocks)), "a block is in two states, or in none"
        assert not self._tainted & cached, "content that is not finite is cached"

    def _take(self) -> Block:
        index = self._free.popleft() if self._free else self._evict()
        self._stamps[index] += 1
        self._uses[index] = 1
        if index in self._tainted or index in self._suspects:
            self._tainted.discard(index)
            self._unclean.append(index)
        return Block(index, self._stamps[index])

    def _evict(self) -> int:
        index, _ = self._cached.popitem(last=False)
        self.on_evict(index)
        return index

    def _drop(self, block: Block) -> bool:
        """Remove one holder. Returns whether it was the last."""
        assert self._stamps[block.index] == block.stamp, "a block was released by a sequence that no longer holds it"
        self._uses[block.index] -= 1
        return self._uses[block.index] == 0


def _ignore(index: int) -> None:
    """Do nothing: the default of ``on_evict``."""
