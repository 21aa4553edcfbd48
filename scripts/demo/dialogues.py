"""Dialogues that the bundled demo model is trained on and measured with: made up here, the same for the same seed.

A dialogue is a chain of turns over one ``State``; what a turn's reply must be follows from the state and the
user's words alone, so that a reply is either right or wrong. *Held-out* dialogues are made only of combinations that
training never meets: a wording together with its opener and fillers, a person's name, a pair of numbers to add.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.topics import next_turn, system_prompt
from demo.turns import Draw, State, Turn


@dataclass(frozen=True)
class Dialogue:
    """A conversation; ``system`` is the system prompt or ``None``."""

    system: str | None
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        """The conversation as a list of chat messages."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        pairs = ((("user", turn.user), ("assistant", turn.reply)) for turn in self.turns)
        return start + [{"role": role, "content": text} for pair in pairs for role, text in pair]


def make_dialogue(
    rng: random.Random, *, held_out: bool = False, turns: tuple[int, int] = (1, 6), practise: str | None = None
) -> Dialogue:
    """One dialogue of ``turns`` (least, most) turns; topics are drawn by weight and mixed.

    ``practise``: "copying", "sums" or "memory", which then make up about half of the turns.
    """
    draw, state = Draw(rng, held_out=held_out), State()
    system = system_prompt(draw, state)
    count = rng.randint(*turns)
    return Dialogue(system, tuple(next_turn(draw, state, last=i == count - 1, practise=practise) for i in range(count)))


def make_dialogues(seed: int, count: int, *, held_out: bool = False, turns: tuple[int, int] = (1, 6)) -> list[Dialogue]:
    """``count`` dialogues; the same ones for the same arguments."""
    rng = random.Random(f"{seed}-{held_out}")
    return [make_dialogue(rng, held_out=held_out, turns=turns) for _ in range(count)]
