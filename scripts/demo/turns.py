"""Turns of the demo model's dialogues: their wordings, the state that they depend on, and random choices among them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

HELD_OUT_PER_HUNDRED = 10
LOWER_CASE_RATE = 0.25
BARE_RATE = 0.5
TYPO_RATE = 0.05


@dataclass(frozen=True)
class Tone:
    """Texts around a wording: ``openers`` before it, ``closers`` after it."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]


QUESTION = Tone(
    (
        *(
            "Hey, ",
            "So, ",
            "OK, ",
            "Please: ",
            "Well, ",
            "Next: ",
            "Hmm, ",
            "Now, ",
            "Quick question: ",
            "By the way, ",
        ),
        *(
            "One more thing: ",
            "I have a question: ",
            "Another question: ",
            "Let me ask: ",
            "Could you help me? ",
            "Hi! ",
        ),
        *(
            "Thanks. ",
            "Great. ",
            "Good. ",
            "I see. ",
            "Alright, ",
            "Just curious: ",
            "Tell me: ",
            "Hello! ",
            "And ",
            "Then ",
        ),
    ),
    ("", "", "", " Thanks.", " Please.", " Thank you!", " I am curious.", " Please tell me.", " I want to know."),
)
UNCLOSED = Tone(QUESTION.openers, ("",))
REMARK = Tone(
    (
        *("Well, ", "OK, ", "So, ", "Hmm, ", "By the way, ", "Oh, ", "Ah, ", "Alright, ", "Hey, ", "Now, ", "Right, "),
        *("Good. ", "I see. ", "Oh! ", "Great. ", "Yes, ", "You know, ", "And "),
    ),
    ("", "", "", " :)", " Ha.", " Really.", " Oh."),
)


@dataclass(frozen=True)
class Turn:
    """What the user says, the only right reply, and the topic it counts for."""

    topic: str
    user: str
    reply: str


@dataclass
class State:
    """What has been said so far, as far as later replies depend on it."""

    name: str | None = None
    city: str | None = None
    bot: str | None = None
    favourites: dict[str, str] = field(default_factory=dict)
    last_flag: str | None = None
    last_result: int | None = None
    offered_joke: bool = False

    def forget_context(self) -> None:
        """A new subject: "and its default?" no longer refers to anything."""
        self.last_flag = None
        self.last_result = None
        self.offered_joke = False


@cache
def is_held_out(combination: str) -> bool:
    """Whether a combination belongs to the held-out tenth; by checksum, so it never changes with the seed."""
    return zlib.crc32(combination.encode()) % 100 < HELD_OUT_PER_HUNDRED


class Draw:
    """Random choices of one dialogue that respect the split. ``held_out`` asks for unseen combinations only."""

    def __init__(self, rng: random.Random, *, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out

    def choice(self, options: Sequence[str]) -> str:
        """One of ``options``, whatever the split."""
        return options[self.rng.randrange(len(options))]

    def chance(self, rate: float) -> bool:
        """True at ``rate``."""
        return self.rng.random() < rate

    def pick(self, options: Sequence[str]) -> str:
        """One of ``options`` of this split (a name, say); all options if the split has none of them."""
        mine = tuple(option for option in options if is_held_out(option) == self.held_out)
        return self.choice(mine or options)

    def say(self, wordings: Sequence[str], tone: Tone = QUESTION, **fillers: str) -> str:
        """A wording with opener, closer and ``fillers``, as a combination of this split.

        A bare wording without fillers is always training's: the split asks for new combinations, not new sentences.
        """
        for _ in range(200):
            wording, opener, closer = self._parts(wordings, tone)
            key = "|".join((opener, wording, closer, *fillers.values()))
            bare = not (opener or closer or fillers)
            if (is_held_out(key) and not bare) == self.held_out:
                return self._style(opener + _join(opener, wording) + closer).format(**fillers)
        raise AssertionError(f"no combination of {wordings} in this split")

    def _parts(self, wordings: Sequence[str], tone: Tone) -> tuple[str, str, str]:
        wording = self.choice(wordings)
        if self.chance(BARE_RATE) and not self.held_out:
            return wording, "", ""
        opener = self.choice(tone.openers) if self.chance(0.7) else ""
        return wording, opener, self.choice(tone.closers)

    def _style(self, text: str) -> str:
        if self.chance(LOWER_CASE_RATE):
            text = text.lower()
        if self.chance(TYPO_RATE):
            text = self._with_typo(text)
        return text.rstrip(".?!") if self.chance(LOWER_CASE_RATE) else text

    def _with_typo(self, text: str) -> str:
        """One letter lost, or two swapped, inside a longer word that is no filler."""
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
        if places:
            place = places[self.rng.randrange(len(places))]
            word, at = words[place], self.rng.randint(1, len(words[place]) - 2)
            middle = word[at + 1] + word[at] if self.chance(0.5) else word[at]
            words[place] = word[:at] + middle + word[at + 2 :]
        return " ".join(words)


def _join(opener: str, wording: str) -> str:
    """Lower the first letter after an opener that does not end a sentence ("So, how …"), except for "I"."""
    word = wording.split(" ", 1)[0].rstrip(".,!")
    lower = opener and opener[-2] not in ".!?" and word.istitle() and word not in ("I", "I'm")
    return wording[0].lower() + wording[1:] if lower else wording
