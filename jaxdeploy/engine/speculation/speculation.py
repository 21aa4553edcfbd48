"""Speculative decoding: draft tokens, verify them all in one step, accept those that are right (arXiv:2211.17192).

A draft is right if the model samples the same token in its place. A sample depends only on the tokens before it, the
request's seed and the position. So a reply is the same with and without drafts, at any temperature and with any
proposer. Drafts without randomness are accepted as often as by rejection sampling. A draft model draws with the same
noise, so it agrees with the model nearly as often (arXiv:2408.07978).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.speculation.gate import Gate
from jaxdeploy.messages import SpeculationCounts

logger = logging.getLogger("jaxdeploy")

MAX_FAULTS = 3
"""Failures of a proposer after which no more drafts are asked for."""


class Proposer(Protocol):
    """Proposes draft tokens."""

    def propose(self, room: Mapping[Sequence, int]) -> Mapping[Sequence, tuple[int, ...]]:
        """Return drafts that follow the known tokens of each sequence, no more than there is room for, or none."""
        ...

    def warm_up(self, progress: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Compile everything that can run."""
        ...

    def clear_blocks(self, blocks: list[int]) -> None:
        """Overwrite the content of KV blocks with zeros."""
        ...

    def close(self) -> None:
        """Give the device memory back."""
        ...


class Speculation:
    """A proposer that drafts ``count`` tokens at a time, and the gate that measures whether that saves time."""

    def __init__(self, proposer: Proposer, count: int, gate: Gate | None = None) -> None:
        self.count = count
        self.gate = gate or Gate()
        self.counts = SpeculationCounts()
        """Drafts of all sequences."""
        self.warm_up = proposer.warm_up
        self.close = proposer.close
        self.clear_blocks = proposer.clear_blocks
        self._faults = 0
        self._proposer = proposer

    def should_draft(self, running: Iterable[Sequence]) -> bool:
        """Whether the next step for these sequences should have drafts."""
        if self._faults >= MAX_FAULTS:
            return False
        batch = list(running)
        return any(self.max_drafts(sequence) for sequence in batch) and self.gate.is_open(len(batch))

    def max_drafts(self, sequence: Sequence) -> int:
        """Return the number of tokens to reserve room for; 0 if the request wants no drafts."""
        return 0 if sequence.sampling.num_speculative_tokens == 0 else self.count

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """Return drafts, up to the number that each request allows and to a token that ends the reply.

        A fault costs only the drafts of this step. After ``MAX_FAULTS`` there are no more drafts.
        """
        try:
            proposed = self._proposer.propose(room)
        except Exception:  # replies are the same without drafts
            self._faults += 1
            logger.exception("drafting failed (%d of %d times until it is turned off)", self._faults, MAX_FAULTS)
            for sequence in room:
                sequence.draft.computed = 0
            return {}
        return {sequence: _allowed(drafts, sequence) for sequence, drafts in proposed.items()}

    def accept(self, sequence: Sequence, drafts: tuple[int, ...], sampled: list[int]) -> list[int]:
        """Return the sampled tokens up to the first that follows a wrong draft."""
        right = 0
        while right < len(drafts) and drafts[right] == sampled[right]:
            right += 1
        sequence.draft.counts = sequence.draft.counts.plus(len(drafts), right)
        self.counts = self.counts.plus(len(drafts), right)
        return sampled[: right + 1]


def _allowed(drafts: tuple[int, ...], sequence: Sequence) -> tuple[int, ...]:
    sampling = sequence.sampling
    some = drafts[: sampling.num_speculative_tokens]
    ends = (index for index, token in enumerate(some) if token < 0 or token in sampling.stop_token_ids)
    return some[: next(ends, None)]
