"""Keys and values that the last turn of a conversation leaves for the next one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from jaxdeploy.engine.scheduling.blocks import Block, Start
from jaxdeploy.engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Turn:
    """Tokens with keys and values, the blocks that hold them, and the start of the sequence that computed them."""

    token_ids: list[int]
    blocks: list[Block]
    start: Start


class Sessions:
    """Remembers the blocks of ended sequences by ``session_id``, for prompts that continue them.

    ``PrefixCache`` finds full blocks of any sequence. A session also has its last block, which is only partly filled.
    The blocks are not held: they stay cached until others need them. The newest ``max_sessions`` are remembered.
    """

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._turns: OrderedDict[str, _Turn] = OrderedDict()

    def leave(self, sequence: Sequence) -> bool:
        """Remember a sequence that ends as its session's last turn. Returns whether it has a session."""
        session = sequence.request.session_id
        if session is None:
            return False
        self._turns.pop(session, None)
        known = min(sequence.placement.computed, len(sequence.token_ids))
        self._turns[session] = _Turn(sequence.token_ids[:known], sequence.placement.blocks, sequence.start)
        if len(self._turns) > self._max_sessions:
            self._turns.popitem(last=False)
        return True

    def resume(self, sequence: Sequence) -> None:
        """Give a new sequence the blocks of its session's last turn, if its prompt continues it.

        The turn is forgotten: the sequence continues to write in its last block, so no other may start there.
        """
        session = sequence.request.session_id
        if session is None or session not in self._turns:
            return
        turn = self._turns[session]
        if turn.start == sequence.start and sequence.token_ids[: len(turn.token_ids)] == turn.token_ids:
            del self._turns[session]
            # The sequence holds them when it is admitted, as far as they are still valid then.
            sequence.placement.blocks = turn.blocks
            sequence.placement.computed = len(turn.token_ids)
