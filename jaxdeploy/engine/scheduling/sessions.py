"""What the last turn of a conversation leaves for the next one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from jaxdeploy.engine.scheduling.sequence import Block, Sequence, Start


@dataclass(frozen=True, slots=True)
class _Turn:
    """Tokens that have keys and values, the blocks that hold them, and the start of the sequence that computed them."""

    token_ids: list[int]
    blocks: list[Block]
    start: Start


class Sessions:
    """Remembers where the tokens of sequences lie that ended, by ``session_id``, for prompts that go on from them.

    ``PrefixCache`` finds whole blocks, whoever computed them; a session also has its last one, filled in part. Nobody
    holds the blocks: they stay until others need them. Only the newest ``most`` sessions are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns: OrderedDict[str, _Turn] = OrderedDict()

    def leave(self, sequence: Sequence) -> bool:
        """Remember a sequence that ends, in place of what its session had; whether it is of one."""
        session = sequence.request.session_id
        if session is None:
            return False
        self._turns.pop(session, None)
        known = min(sequence.computed, len(sequence.token_ids))
        self._turns[session] = _Turn(sequence.token_ids[:known], sequence.blocks, sequence.start)
        if len(self._turns) > self._most:
            self._turns.popitem(last=False)
        return True

    def resume(self, sequence: Sequence) -> None:
        """Give a new sequence the blocks of its session's last turn, if its prompt goes on from there.

        They are its own from now on: it writes on where the last turn ended, so no other may begin there.
        """
        session = sequence.request.session_id
        if session is None or session not in self._turns:
            return
        turn = self._turns[session]
        if turn.start == sequence.start and sequence.token_ids[: len(turn.token_ids)] == turn.token_ids:
            del self._turns[session]
            sequence.blocks, sequence.computed = turn.blocks, len(turn.token_ids)
