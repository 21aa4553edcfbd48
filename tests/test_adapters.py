"""Slots of the device: who holds one keeps it, the longest unused is given up, and names come and go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import data, integers

from jaxdeploy.engine.scheduling.adapters import Adapter, Adapters
from jaxdeploy.errors import UnknownAdapterError


def loaded(slots: int, *names: str) -> Adapters:
    adapters = Adapters(slots)
    for name in names:
        adapters.load(name, name)
    return adapters


def test_the_longest_unused_gives_up_its_slot() -> None:
    adapters = loaded(2, "a", "b", "c")
    for name in ("a", "b", "a"):
        adapters.hold(adapters.named(name))
        adapters.release(adapters.named(name))
    adapters.hold(adapters.named("c"))
    assert adapters.named("b").slot is None
    assert [(slot, adapter.name) for slot, adapter in adapters.uploads()] == [(0, "a"), (1, "b"), (1, "c")]
    assert not adapters.uploads()


def test_slots_in_use_are_kept() -> None:
    adapters = loaded(1, "a", "b")
    first, second = adapters.named("a"), adapters.named("b")
    adapters.hold(first)
    adapters.hold(first)
    assert adapters.has_room(first)
    assert not adapters.has_room(second)
    adapters.release(first)
    assert not adapters.has_room(second)
    adapters.release(first)
    assert adapters.has_room(second)


def test_sequences_without_an_adapter_need_no_slot() -> None:
    adapters = Adapters()
    assert adapters.has_room(None)
    adapters.hold(None)
    adapters.release(None)
    assert adapters.used == 0


def test_unknown_names() -> None:
    with pytest.raises(UnknownAdapterError, match=r"adapter='a' is not loaded; none is loaded; load it first"):
        Adapters(1).named("a")
    adapters = loaded(1, "b", "c")
    with pytest.raises(UnknownAdapterError, match=r"adapter='a' is not loaded; choose one of b, c"):
        adapters.unload("a")
    assert adapters.names == ("b", "c")
    assert UnknownAdapterError.http_status == 404


def test_one_that_is_unloaded_in_use_keeps_its_slot_to_the_end() -> None:
    adapters = loaded(1, "a")
    old = adapters.named("a")
    adapters.hold(old)
    adapters.load("a", "new")
    assert adapters.named("a") is not old
    assert not adapters.has_room(adapters.named("a"))
    adapters.release(old)
    assert old.slot is None
    adapters.hold(adapters.named("a"))
    assert [adapter.content for _, adapter in adapters.uploads()] == ["a", "new"]


class Slots(RuleBasedStateMachine):
    """Anything in any order; what the device would have copied is where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = Adapters(3)
        self.running: list[Adapter] = []
        self.device: dict[int, Any] = {}
        self.loads = 0

    @rule(name=integers(0, 5))
    def load(self, name: int) -> None:
        self.loads += 1
        self.adapters.load(str(name), self.loads)

    @precondition(lambda self: self.adapters.names)
    @rule(drawn=data())
    def unload(self, drawn: Any) -> None:
        names = self.adapters.names
        self.adapters.unload(names[drawn.draw(integers(0, len(names) - 1))])

    @precondition(lambda self: self.adapters.names)
    @rule(drawn=data())
    def start(self, drawn: Any) -> None:
        names = self.adapters.names
        adapter = self.adapters.named(names[drawn.draw(integers(0, len(names) - 1))])
        if self.adapters.has_room(adapter):
            self.adapters.hold(adapter)
            self.running.append(adapter)
        else:
            assert len({*self.running}) == 3

    @precondition(lambda self: self.running)
    @rule(drawn=data())
    def end(self, drawn: Any) -> None:
        self.adapters.release(self.running.pop(drawn.draw(integers(0, len(self.running) - 1))))

    @invariant()
    def runs_with_its_own(self) -> None:
        self.device |= {slot: adapter.content for slot, adapter in self.adapters.uploads()}
        self.adapters.check()
        assert self.adapters.used == len({*self.running})
        for adapter in self.running:
            assert adapter.slot is not None
            assert self.device[adapter.slot] == adapter.content


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
