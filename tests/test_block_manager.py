"""Blocks are free, held or cached, and never two of these."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.engine.scheduling.block_manager import BlockManager, OutOfBlocksError
from jaxdeploy.engine.scheduling.blocks import Block


def indices(blocks: list[Block]) -> list[int]:
    return [block.index for block in blocks]


def test_allocate_takes_blocks_nobody_holds() -> None:
    manager = BlockManager(4)
    first, second = manager.allocate(3), manager.allocate(1)
    assert sorted(indices(first + second)) == [0, 1, 2, 3]
    assert (manager.active, manager.available, manager.cached) == (4, 0, 0)


def test_too_few_blocks_takes_none() -> None:
    manager = BlockManager(3)
    manager.allocate(1)
    with pytest.raises(OutOfBlocksError, match="3 blocks wanted, 2 available"):
        manager.allocate(3)
    assert (manager.active, manager.available) == (1, 2)
    manager.check()


def test_released_blocks_cannot_be_revived() -> None:
    manager = BlockManager(3)
    blocks = manager.allocate(2)
    manager.release(blocks)
    assert manager.hold(blocks) == []
    assert (manager.available, manager.cached) == (3, 0)


def test_retired_blocks_come_back_as_they_were() -> None:
    manager = BlockManager(3)
    blocks = manager.allocate(2)
    manager.retire(blocks)
    assert (manager.available, manager.cached) == (3, 2)
    assert manager.hold(blocks) == blocks
    assert (manager.active, manager.cached) == (2, 0)


def test_free_blocks_are_taken_before_cached_ones() -> None:
    manager = BlockManager(3)
    kept = manager.allocate(2)
    manager.retire(kept)
    assert manager.allocate(1)[0].index not in indices(kept)
    assert manager.hold(kept) == kept


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    manager = BlockManager(4)
    blocks = manager.allocate(4)
    manager.retire(blocks)
    taken = manager.allocate(1)
    assert indices(taken) == [blocks[-1].index]
    assert manager.hold(blocks) == blocks[:3]


def test_what_was_retired_first_is_evicted_first() -> None:
    manager = BlockManager(2)
    old, new = manager.allocate(1), manager.allocate(1)
    manager.retire(old)
    manager.retire(new)
    manager.allocate(1)
    assert manager.hold(old) == []
    assert manager.hold(new) == new


def test_content_that_was_replaced_is_not_revived() -> None:
    manager = BlockManager(1)
    old = manager.allocate(1)
    manager.retire(old)
    manager.retire(manager.allocate(1))  # cached again, but with somebody else's tokens
    assert manager.cached == 1
    assert manager.hold(old) == []


def test_a_hole_ends_what_can_be_revived() -> None:
    manager = BlockManager(3)
    blocks = manager.allocate(3)
    manager.retire(blocks[1:2])
    manager.allocate(1)
    manager.retire([blocks[0], blocks[2]])
    assert manager.hold(blocks) == blocks[:1]


@pytest.mark.parametrize("let_go", ["release", "retire"])
def test_letting_go_of_another_holders_block_is_noticed(let_go: str) -> None:
    manager = BlockManager(1)
    old = manager.allocate(1)
    manager.release(old)
    manager.allocate(1)
    with pytest.raises(AssertionError, match="no longer holds it"):
        getattr(manager, let_go)(old)


def test_check_notices_a_block_let_go_twice() -> None:
    manager = BlockManager(1)
    blocks = manager.allocate(1)
    manager.release(blocks)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="more often than it was held"):
        manager.check()


ACTIONS = st.tuples(st.sampled_from(["allocate", "release", "retire", "hold"]), st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 8), actions=st.lists(ACTIONS, max_size=50))
def test_invariants_hold_whatever_happens(count: int, actions: list[tuple[str, int]]) -> None:
    """A model keeps what each block holds; a revived block must still hold it, and no block has two holders."""
    manager = BlockManager(count)
    content: dict[int, Block] = {}
    held: list[list[Block]] = []
    retired: list[list[Block]] = []
    for action, number in actions:
        if action == "allocate" and number <= manager.available:
            held.append(manager.allocate(number))
            content.update((block.index, block) for block in held[-1])
        elif action in ("release", "retire") and held:
            blocks = held.pop(number % len(held))
            getattr(manager, action)(blocks)
            if action == "retire":
                retired.append(blocks)
        elif action == "hold" and retired:
            held.append(manager.hold(retired.pop(number % len(retired))))
            assert all(content[block.index] == block for block in held[-1])
        manager.check()
        mine = [block.index for blocks in held for block in blocks]
        assert len(mine) == len(set(mine)) == manager.active
        assert manager.active + manager.available == count
