"""From tokens to the text that may be shown: decoded as it comes, held back while a stop word may be forming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class IncrementalDecoder(Protocol):
    """What is needed of a ``jaxdeploy.tokenizer.Detokenizer``."""

    def push(self, token_id: int) -> str:
        """Text that is certain with this token."""
        ...

    def flush(self) -> str:
        """The rest at the end."""
        ...


class TextStream:
    """The text of one reply. ``stop_word`` is the one that was found; text after it is dropped.

    Stop words are matched on text, so they may begin and end inside tokens. Before ``min_new_tokens`` none counts.
    """

    def __init__(
        self, decoder: IncrementalDecoder, stop_words: Sequence[str], *, include_stop: bool, min_new_tokens: int
    ) -> None:
        self.stop_word: str | None = None
        self._decoder = decoder
        self._stop_words = tuple(stop_words)
        self._include_stop = include_stop
        self._uncounted = min_new_tokens
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop word was found."""
        return self.stop_word is not None

    def push(self, token_id: int) -> str:
        """The text that may be shown now that ``token_id`` has come."""
        self._uncounted -= 1
        return self._take(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.flush())
        held, self._held = ("" if self.stopped else self._held), ""
        return text + held

    def _take(self, text: str) -> str:
        self._held += text
        if self._uncounted > 0:
            return self._release(len(self._held))
        found = [(*self._span(word), word) for word in self._stop_words if word in self._held]
        if found:
            end, start, self.stop_word = min(found)
            return self._release(end if self._include_stop else start)
        return self._release(len(self._held) - self._forming())

    def _span(self, word: str) -> tuple[int, int]:
        """End and start of ``word`` in the held text. What ends first wins, so that pieces do not matter."""
        start = self._held.index(word)
        return start + len(word), start

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _forming(self) -> int:
        """Length of the longest end of the held text that a stop word begins with."""
        lengths = (
            size
            for word in self._stop_words
            for size in range(1, min(len(word), len(self._held) + 1))
            if self._held.endswith(word[:size])
        )
        return max(lengths, default=0)
