"""The order of waiting sequences: by urgency, then by the service that their tenant had, then by arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jaxdeploy.engine.scheduling.sequence import Sequence

PROMPT_COST = 1
"""Cost of a prompt token on its tenant's account."""
REPLY_COST = 2
"""Cost of a reply token, which takes a separate step."""

MAX_TENANTS = 4096
"""Maximum tenants whose account is kept while none of their sequences waits."""


class WaitingQueue:
    """Sequences that have no slot, in the order in which they get one.

    Tenants of equal priority share fairly. Each has an account of the tokens that it was served, and the lowest account
    is next. A tenant that returns after a pause starts no lower than those that wait, so service cannot be saved up.
    This is the virtual token counter of arXiv:2401.00588.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, str], deque[Sequence]] = {}
        self._served: dict[str, int] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate in no particular order."""
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence after those of its tenant."""
        tenant, waiting = sequence.request.tenant, {tenant for _, tenant in self._queues}
        if tenant not in waiting:
            lowest = min((self._served[other] for other in waiting), default=0)
            self._served[tenant] = max(self._served.pop(tenant, 0), lowest)
            self._forget_tenants(waiting)
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._queue_of(sequence).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that has run before those of its tenant."""
        self._queue_of(sequence).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence."""
        key = _key(sequence)
        self._queues[key].remove(sequence)
        if not self._queues[key]:
            del self._queues[key]

    def first(self) -> Sequence:
        """Return the next to run. The queue must not be empty."""
        _, queue = min(
            self._queues.items(), key=lambda item: (item[0][0], self._served[item[0][1]], item[1][0].arrival)
        )
        return queue[0]

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Add the cost of a sequence's tokens to its tenant's account."""
        tenant = sequence.request.tenant
        self._served[tenant] = self._served.get(tenant, 0) + cost

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        self._served.setdefault(sequence.request.tenant, 0)
        return self._queues.setdefault(_key(sequence), deque())

    def _forget_tenants(self, waiting: set[str]) -> None:
        """Limit the number of accounts. The tenant whose last request is oldest goes first."""
        if len(self._served) > MAX_TENANTS:
            oldest = next(tenant for tenant in self._served if tenant not in waiting)
            del self._served[oldest]


def _key(sequence: Sequence) -> tuple[int, str]:
    return sequence.request.priority, sequence.request.tenant
