"""Sequences that have a slot on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.sequence import Sequence


class RunningSequences:
    """Hands out the ``max_batch_size`` slots of the token buffer, and the slots of ``adapters`` with them.

    Iterates over the sequences in the order in which they got their slots.
    """

    def __init__(self, max_batch_size: int, adapters: Adapters) -> None:
        self._free_slots = deque(range(max_batch_size))
        self._adapters = adapters
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def free_slots(self) -> int:
        """Slots that no sequence has."""
        return len(self._free_slots)

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences whose prefill is scheduled completely."""
        return [sequence for sequence in self._sequences if not sequence.prefilling]

    @property
    def prefilling(self) -> list[Sequence]:
        """Sequences with prompt tokens that no step has been scheduled for."""
        return [sequence for sequence in self._sequences if sequence.prefilling]

    @property
    def lowest(self) -> Sequence:
        """The first to be preempted: the least urgent, and of those the youngest. At least one must run."""
        return max(self._sequences, key=rank)

    def start(self, sequence: Sequence) -> None:
        """Give a sequence a slot, and its adapter one if it has none. There must be room for both."""
        sequence.placement.slot = self._free_slots.popleft()
        self._adapters.hold(sequence.adapter)
        self._sequences.append(sequence)

    def stop(self, sequence: Sequence) -> None:
        """Take back the slot of a sequence, and its use of the adapter's slot. The caller gives its blocks back."""
        slot = sequence.placement.slot
        assert slot is not None, "only running sequences have a slot to give back"
        self._sequences.remove(sequence)
        self._free_slots.append(slot)
        self._adapters.release(sequence.adapter)
        sequence.placement.slot = None


def rank(sequence: Sequence) -> tuple[int, int]:
    """Return the order in which sequences keep their blocks when there are too few: by urgency, then by arrival."""
    return sequence.request.priority, sequence.arrival
