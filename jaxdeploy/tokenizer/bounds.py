"""A lower bound on the number of tokens of a text, found without tokenising it.

A token stands for a limited number of bytes, as long as the tokenizer keeps every character. If it may drop
characters, or read a run of unknown ones as one token, there is no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxdeploy.tokenizer.settings import AddedToken

NORMAL_FORM = 4
"""Bytes that a Unicode normal form, or lower case, may turn into one."""

PIECE = 1 << 16
"""Characters that are checked in one step, so that other threads do not wait long."""

KEEPS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"})
"""Ways of cutting a text into words that keep all of it."""
KEEPS_WORDS = frozenset({"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})
"""Those that drop white space."""

PROBE = "A\x07\u200b\uff21\ufb01"
"""Characters that a sentencepiece model without normalisation leaves as they are."""


@dataclass(frozen=True)
class TokenBound:
    """A lower bound on the number of tokens of a text.

    ``longest``: the most bytes of text in one token; 0 if no bound is known.
    ``spaces_count``: whether white space is kept.
    """

    longest: int = 0
    spaces_count: bool = True

    def least(self, text: str) -> int:
        """Return the smallest number of tokens that ``text`` can have."""
        if not self.longest:
            return 0
        size = 0
        for start in range(0, len(text), PIECE):
            size += len(self._kept(text[start : start + PIECE]).encode("utf-8", "surrogatepass"))
        return -(-size // self.longest)

    def _kept(self, piece: str) -> str:
        return piece if self.spaces_count else "".join(piece.split())


def bound_of_description(
    description: Mapping[str, Any], added: Iterable[Any], tokens: Iterable[bytes], texts: Iterable[str]
) -> TokenBound:
    """Return the bound of a ``tokenizers`` description with ``added`` tokens.

    ``tokens`` is the vocabulary in bytes, ``texts`` the vocabulary as written in the file.
    """
    cuts = _steps(description.get("pre_tokenizer"), "pretokenizers")
    shrinks = _shrinks(_steps(description.get("normalizer"), "normalizers"))
    bytes_kept = any(step["type"] == "ByteLevel" for step in cuts)
    if not shrinks or not all(map(_keeps_words, cuts)) or not _knows_all_bytes(description["model"], bytes_kept):
        return TokenBound()
    longest = max(map(len, tokens), default=0)
    if not bytes_kept:
        longest = max(longest, *(len(text.encode()) for text in texts))
    strips = any(token.lstrip or token.rstrip for token in added)
    drops = any(step["type"] in KEEPS_WORDS for step in cuts)
    return TokenBound(shrinks * longest, not strips and not drops)


def bound_of_sentencepiece(model: Any, added: Iterable[AddedToken]) -> TokenBound:
    """Return the bound of a sentencepiece model with ``added`` tokens. It may drop white space."""
    if sum(map(model.is_byte, range(len(model)))) < 256 or PROBE not in model.normalize(PROBE):
        return TokenBound()
    texts = [*(str(model.id_to_piece(piece)) for piece in range(len(model))), *(token.content for token in added)]
    return TokenBound(max(len(text.encode()) for text in texts), False)


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[name] for step in _steps(inner, name)]
    return [part]


def _shrinks(steps: Iterable[Mapping[str, Any]]) -> int:
    """Return how many bytes of text the normaliser may turn into one; 0 if without limit."""
    factor = 1
    for step in steps:
        shrinks = _SHRINKS.get(step["type"])
        factor *= 0 if shrinks is None else shrinks(step)
    return factor


def _replaced(step: Mapping[str, Any]) -> int:
    old, new = step["pattern"].get("String", ""), step["content"]
    return -(-len(old.encode()) // len(new.encode())) if old and new else 0


_SHRINKS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase"), lambda _: NORMAL_FORM),
    **dict.fromkeys(("Prepend", "ByteLevel"), lambda _: 1),
    "Replace": _replaced,
}


def _keeps_words(step: Mapping[str, Any]) -> bool:
    kind = step["type"]
    return kind in KEEPS | KEEPS_WORDS or (kind in ("Split", "Punctuation") and step.get("behavior") != "Removed")


def _knows_all_bytes(model: Mapping[str, Any], byte_level: bool) -> bool:
    """Return whether no character is unknown."""
    if byte_level:
        return model.get("type", "BPE") == "BPE" and model.get("unk_token") is None
    return bool(model.get("byte_fallback"))
