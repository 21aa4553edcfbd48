"""How the prompt tokens of one step are divided among sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxdeploy.engine.scheduling.sequence import Sequence


class PrefillPlan:
    """Which sequences compute how many prompt tokens in one step.

    Half of the budget goes to the sequences that came first. The rest goes to prompts that it completes. The scheduler
    then admits new sequences and gives what is left to the first ones again. So a long prompt is not starved, and it
    does not delay short ones.
    """

    def __init__(self, budget: int, row_length: int, advance: Callable[[Sequence, int], int]) -> None:
        """``advance`` schedules the next tokens of a sequence, up to a maximum, and returns how many.

        The budget counts whole rows of ``row_length`` tokens, because rows are not shared.
        """
        self.tokens: dict[Sequence, int] = {}
        """Tokens of each sequence in this step."""
        self.left = budget
        """What is left of the budget."""
        self._budget = budget
        self._row_length = row_length
        self._advance = advance

    def give(self, sequence: Sequence, max_tokens: int) -> None:
        """Schedule up to ``max_tokens`` more tokens of a sequence, if its prefill is not complete."""
        if sequence.prefilling and max_tokens > 0 and (tokens := self._advance(sequence, max_tokens)):
            self.left -= self._cost(tokens)
            self.tokens[sequence] = self.tokens.get(sequence, 0) + tokens

    def give_half(self, sequences: Iterable[Sequence]) -> None:
        """Give half of the budget to ``sequences``, in their order."""
        half = self._cost(self._budget // 2)
        for sequence in sequences:
            self.give(sequence, half - (self._budget - self.left))

    def complete(self, sequences: Iterable[Sequence]) -> None:
        """Complete the prefills that fit into what is left, the shortest first."""
        for sequence in sorted(sequences, key=_uncomputed):
            if _uncomputed(sequence) <= self.left:
                self.give(sequence, self.left)

    def _cost(self, tokens: int) -> int:
        return -(-tokens // self._row_length) * self._row_length


def _uncomputed(sequence: Sequence) -> int:
    """Return the tokens that the prefill of a sequence still has to compute."""
    return sequence.placement.prefill_end - sequence.placement.computed
