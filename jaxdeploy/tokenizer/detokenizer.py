"""Token ids to text, at once or one by one.

Every token stands for bytes; text is those bytes read as UTF-8, an invalid sequence becoming U+FFFD. Both ways of
decoding share the bytes, so what is streamed equals what is decoded at once whatever the ids are.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import filterfalse
from typing import Protocol

UTF8_LOOK_BACK = 8
"""Prompt tokens that are looked at for an unfinished character: one has at most 4 bytes, some tokens have none."""


class TokenBytes(Protocol):
    """What decoding needs to know about a vocabulary."""

    special_ids: frozenset[int]
    strips_first_space: bool
    """The first word of a text was encoded with a space put in front; decoding takes it away again."""
    spaces_specials: bool
    """Special tokens that are shown may be set apart by spaces (sentencepiece files only, as in transformers)."""

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text, its leading space included; none for an unknown id."""
        ...


class ByteStream:
    """Turns ids into bytes one by one; knows where the text begins and what was shown last."""

    def __init__(self, vocabulary: TokenBytes, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._spaced = spaces_between_special_tokens and vocabulary.spaces_specials
        self._at_start = True
        self._after_special = False

    def start_inside_text(self) -> None:
        """The text has begun before the first id: keep that one's leading space."""
        self._at_start = False

    def push(self, *token_ids: int) -> bytes:
        """Return the bytes that these tokens add."""
        vocabulary = self._vocabulary
        pieces = []
        for token_id in token_ids:
            special = token_id in vocabulary.special_ids
            piece = b"" if special and self._skip else vocabulary.bytes_of(token_id)
            if not piece:
                continue
            at_start, self._at_start = self._at_start, False
            apart = self._spaced and not at_start and (special or self._after_special)
            self._after_special = special
            if vocabulary.strips_first_space and (at_start or apart) and not special:
                piece = piece.removeprefix(b" ")
            pieces.append(b" " + piece if apart else piece)
        return b"".join(pieces)


class Detokenizer:
    """Streams text: holds back the bytes of a character until it is whole.

    ``prompt_ids`` are tokens shown before the first one: after a text the first token keeps its leading space, and a
    character whose first bytes ended the prompt is completed. Special tokens alone are no text.
    """

    def __init__(
        self,
        vocabulary: TokenBytes,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = ByteStream(vocabulary, skip_special_tokens, spaces_between_special_tokens)
        plain_ids = filterfalse(vocabulary.special_ids.__contains__, prompt_ids)
        if any(map(vocabulary.bytes_of, plain_ids)):
            self._bytes.start_inside_text()
            self._utf8.decode(self._bytes.push(*prompt_ids[-UTF8_LOOK_BACK:]))

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; may be empty."""
        return self._utf8.decode(self._bytes.push(token_id))

    def flush(self) -> str:
        """The rest, once no token follows: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def decode(
    vocabulary: TokenBytes, ids: Iterable[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
) -> str:
    """The text of all ``ids`` at once."""
    stream = ByteStream(vocabulary, skip_special_tokens, spaces_between_special_tokens)
    return stream.push(*ids).decode("utf-8", errors="replace")
