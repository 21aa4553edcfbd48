"""The loaded LoRA adapters, and which of them have one of the device's slots.

All adapters are kept in host memory. Those that sequences run with are also on the device, as in S-LoRA
(arXiv:2311.03285). An unused adapter keeps its slot until another one needs it. The longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from jaxdeploy.errors import UnknownAdapterError


@dataclass(frozen=True, eq=False, slots=True)
class Root:
    """Identifies the cached blocks of an adapter's sequences. It lives as long as they do."""


@dataclass(eq=False, slots=True)
class Adapter:
    """A loaded adapter. Loading again under the same name makes another one."""

    name: str
    content: Any = field(repr=False)
    """Arrays that are copied to its slot."""
    root: Root = field(default_factory=Root, repr=False)
    slot: int | None = None
    """Index of its slot on the device, if it has one."""
    users: int = 0
    """Sequences that run with it."""
    unloaded: bool = False
    """Whether requests can no longer name it."""


class Adapters:
    """Adapters by name, and the ``slots`` of the device.

    A running sequence holds its adapter and the adapter's slot. The device must carry out ``uploads`` before the step
    that was scheduled with them.
    """

    def __init__(self, slots: int = 0) -> None:
        self.slots = slots
        self._named: dict[str, Adapter] = {}
        self._free = list(reversed(range(slots)))
        self._idle: OrderedDict[Adapter, None] = OrderedDict()
        self._uploads: list[tuple[int, Adapter]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may use."""
        return tuple(self._named)

    def named(self, name: str) -> Adapter:
        """Return the adapter with a name. Raises ``UnknownAdapterError``."""
        check_adapter(name, self._named)
        return self._named[name]

    def load(self, name: str, content: Any) -> None:
        """Add an adapter. One with the same name is removed when no sequence runs with it."""
        before, self._named[name] = self._named.get(name), Adapter(name, content)
        if before is not None:
            self._forget(before)

    def unload(self, name: str) -> None:
        """Refuse new requests for an adapter. Current ones continue. Raises ``UnknownAdapterError``."""
        self._forget(self.named(name))
        del self._named[name]

    def has_room(self, adapter: Adapter | None) -> bool:
        """Whether ``hold`` is possible now."""
        return adapter is None or adapter.slot is not None or bool(self._free or self._idle)

    def hold(self, adapter: Adapter | None) -> None:
        """Count a sequence that starts to run with an adapter, and give the adapter a slot if it has none."""
        if adapter is None:
            return
        if adapter.slot is None:
            adapter.slot = self._free.pop() if self._free else self._evict()
            self._uploads.append((adapter.slot, adapter))
        self._idle.pop(adapter, None)
        adapter.users += 1

    def release(self, adapter: Adapter | None) -> None:
        """Count a sequence that stops running with an adapter."""
        if adapter is None:
            return
        adapter.users -= 1
        if adapter.users == 0:
            self._idle[adapter] = None
            if adapter.unloaded:
                self._free_slot(adapter)

    def uploads(self) -> list[tuple[int, Adapter]]:
        """Return, once, the adapters to copy to slots before the next step, in this order."""
        uploads, self._uploads = self._uploads, []
        return uploads

    def check(self) -> None:
        """Assert that every slot is free or has one adapter."""
        idle = [adapter.slot for adapter in self._idle]
        assert all(not adapter.users for adapter in self._idle), "an adapter in use may be evicted"
        assert len({*idle, *self._free}) == len(idle) + len(self._free), "a slot is free and taken, or taken twice"
        named = [adapter.slot for adapter in self._named.values() if adapter.slot is not None]
        assert len(set(named)) == len(named), "two adapters have one slot"
        assert not set(named) & set(self._free), "a slot is free and taken"

    @property
    def used(self) -> int:
        """Number of slots whose adapter is in use."""
        return self.slots - len(self._free) - len(self._idle)

    def _forget(self, adapter: Adapter) -> None:
        adapter.unloaded = True
        if adapter in self._idle:
            self._free_slot(adapter)

    def _free_slot(self, adapter: Adapter) -> None:
        assert adapter.slot is not None, "an idle adapter has a slot"
        del self._idle[adapter]
        self._free.append(adapter.slot)
        adapter.slot = None

    def _evict(self) -> int:
        adapter, _ = self._idle.popitem(last=False)
        slot, adapter.slot = adapter.slot, None
        assert slot is not None, "an idle adapter has a slot"
        return slot


def check_adapter(name: str, loaded: Collection[str]) -> None:
    """Raise ``UnknownAdapterError`` if the adapter is not in ``loaded``."""
    if name not in loaded:
        known = f"choose one of {', '.join(loaded)}" if loaded else "none is loaded; load it first"
        raise UnknownAdapterError(f"adapter={name!r:.80} is not loaded; {known}")
