"""Replies that follow a grammar: llguidance says which tokens may come next, from the bytes of the vocabulary's tokens.

A grammar is given in llguidance's own form, a JSON text (``jaxdeploy.grammar.response_format`` makes it).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdeploy.errors import RequestError
from jaxdeploy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = np.ndarray[Any, np.dtype[np.uint32]]

KEPT = 64
"""Grammars that are kept compiled."""

KEPT_SIZE = 2**20
"""Characters of all of them; a character takes up to 500 bytes of memory."""

FORCED = 512
"""Characters of a text that must come next which are turned into tokens at a time."""


class Matcher:
    """Follows one reply through its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allow(self, words: Words, drafts: tuple[int, ...] = ()) -> None:
        """Clear the bits of tokens that cannot come next in ``words``, uint32 [1 + drafts, ceil(V / 32)].

        The rows after the first are for the positions after each of ``drafts``. Rows after a draft that the grammar
        does not allow are unchanged. Tokens that end a reply are allowed at the end of the grammar.
        """
        first, *others = np.atleast_2d(words)
        self._clear(first)
        followed = 0
        for row, draft in zip(others, drafts, strict=True):
            if self._matcher.is_stopped() or not self._matcher.validate_tokens([draft]):
                break
            self._matcher.consume_token(draft)
            followed += 1
            self._clear(row)
        if followed:
            self._matcher.rollback(followed)

    def _clear(self, words: Words) -> None:
        allowed = np.empty_like(words)
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        both = words & allowed
        words[:] = both if both.any() else allowed  # words that were forbidden besides do not break the grammar

    def take(self, token_id: int) -> bool:
        """Advance by ``token_id``. Returns whether the reply still follows the grammar and the matcher can continue."""
        return bool(self._matcher.consume_token(token_id)) and not self._matcher.is_error()


class Grammars:
    """Makes matchers for one vocabulary of V tokens; ``eos_token_ids`` end a reply. Safe to use from several threads.

    ``load`` gives the tokenizer when the first grammar comes.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._load = load
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(token for token in eos_token_ids if token < vocab_size)
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> Matcher:
        """Return a matcher at the beginning of ``grammar``. Raises ``RequestError`` if it is invalid or too large."""
        if not self._eos_token_ids:
            raise RequestError("the model has no token that ends a reply, so none can follow a grammar; leave it out")

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            vocabulary = self._vocabulary
            compiled = self._compiled.pop(grammar, None)
        compiled = compiled or self._compile(vocabulary, grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > KEPT or sum(map(len, self._compiled)) > KEPT_SIZE:
                self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy())

    def _compile(self, vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        compiled = LLMatcher(vocabulary, grammar, log_level=0)
        if not compiled.is_error():
            compiled.compute_bitmask()  # the first call is the slowest; copies inherit its results
        if compiled.is_error():
            fault = next(iter(compiled.get_error().splitlines()), "no reason given")
            raise RequestError(f"the grammar cannot be followed ({fault}); simplify it")
        return compiled

    def _read_vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(self._eos_token_ids)
        vocabulary = _Vocabulary(self._load(), self._vocab_size, ends)
        return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=ends)


_MARK = "\x02"
"""Is never joined with what follows it into a token."""


class _Vocabulary:
    """A tokenizer as llguidance wants to see it: ``size`` tokens, as many as the model has logits.

    Models often have some more than their tokenizer has tokens; those have no text, so they never come.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        known = range(min(tokenizer.vocab_size, size))
        self.tokens = [self._bytes(token_id) for token_id in known] + [b""] * (size - len(known))

    def __call__(self, text: str) -> list[int]:
        """Return the first tokens of ``text`` as the continuation of another text.

        Some tokenizers put a space before every text.

        The caller needs the next token and asks again after it, so a long text is cut.
        """
        text = text[:FORCED]
        wanted = text.encode()
        for before in ("", _MARK):
            ids = self._tokenizer.encode(before + text, add_bos=False, parse_special=False)
            start, size = len(ids), 0
            while start and size < len(wanted):
                start -= 1
                size += len(self.tokens[ids[start]])
            if b"".join(self.tokens[token_id] for token_id in ids[start:]) == wanted:
                return ids[start:]
        return self._longest(wanted)

    def _longest(self, wanted: bytes) -> list[int]:
        """The longest token that begins ``wanted``, if any."""
        ends = range(min(len(wanted), self._most_bytes), 0, -1)
        return next(([self._ids[wanted[:end]]] for end in ends if wanted[:end] in self._ids), [])

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: token_id for token_id, token in enumerate(self.tokens) if token and token_id not in special}

    @cached_property
    def _most_bytes(self) -> int:
        return max(map(len, self._ids), default=0)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.special_ids:
            return self._tokenizer.id_to_token(token_id).encode()
        return self._tokenizer.token_bytes(token_id)
