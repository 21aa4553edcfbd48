"""A ``tokenizer.model``: the sentencepiece library encodes, so ids are its own; added tokens are laid over it by id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError
from jaxdeploy.tokenizer.bounds import TokenBound, bound_of_sentencepiece
from jaxdeploy.tokenizer.huggingface_file import BYTE_TOKEN
from jaxdeploy.tokenizer.settings import AddedToken, Settings

WORD_SPACE = "▁"
WORD = re.compile(f"{WORD_SPACE}[^{WORD_SPACE}]")
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto.normalizer_spec (field 3) holding add_dummy_prefix (field 3) = false. Protocol buffers merge a message
that occurs twice, so these bytes after a model switch its leading space off."""
ERRORS_ONLY = 2


class SentencePieceFile:
    """Vocabulary and encoder of a sentencepiece model, with the checkpoint's added tokens.

    Raises:
        CheckpointError: the file is no sentencepiece model.
    """

    spaces_specials = True

    def __init__(self, path: Path, content: bytes, settings: Settings) -> None:
        self._path = path
        self._content = content
        self._legacy = settings.legacy
        self._model = _processor(path, content)
        self._pieces = _pieces(path, self._model)
        self._overlay = {t.id: t for t in settings.added}
        self._ids = {t.content: i for i, t in self._overlay.items()}
        every = list(range(len(self._model)))
        kinds = zip(self._model.is_control(every), self._model.is_unknown(every), strict=True)
        self._controls = [i for i, kind in enumerate(kinds) if any(kind)]
        self.vocab_size = max(len(self._model), *(i + 1 for i in self._overlay)) if self._overlay else len(self._model)
        self.special_ids = self._special_ids(settings)
        self.strips_first_space = self._strips_first_space()
        self.bos_id, self.eos_id = self._own_id(self._model.bos_id()), self._own_id(self._model.eos_id())
        self.prefix_ids: tuple[int, ...] = () if self.bos_id is None else (self.bos_id,)
        self.suffix_ids: tuple[int, ...] = ()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of ``text`` alone, with tokens kept whole where their text stands in it, or split apart like any text."""
        if parse_special:
            return self._encode_around_tokens(text)
        parts = _broken_inside(text, self._unwanted)
        return [i for n, part in enumerate(parts) for i in self._encode_text(part, spaced=n == 0)]

    def id_to_token(self, token_id: int) -> str:
        """The token's text as the vocabulary writes it; empty for an id outside it."""
        if token_id in self._overlay:
            return self._overlay[token_id].content
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else ""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is none."""
        if token in self._ids:
            return self._ids[token]
        token_id = int(self._model.piece_to_id(token))
        return token_id if self.id_to_token(token_id) == token else None

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 of the token's text; a byte token is its byte."""
        token = self.id_to_token(token_id)
        if token_id in self._overlay or not token:
            return token.encode()
        if self._model.is_byte(token_id):
            return bytes.fromhex(token[3:5])
        return token.replace(WORD_SPACE, " ").encode()

    @cached_property
    def bound(self) -> TokenBound:
        """How many tokens a text has at least."""
        return bound_of_sentencepiece(self._model, self._overlay.values())

    @cached_property
    def _bare_model(self) -> Any:
        """The same model, without the space that it puts in front of a text."""
        return _processor(self._path, self._content + NO_DUMMY_PREFIX)

    @cached_property
    def _whole(self) -> re.Pattern[str]:
        """Every token that is kept whole although sentencepiece itself would cut it."""
        controls = [AddedToken(self._text_of(i), i) for i in self._controls if i not in self._overlay]
        return _pattern([*controls, *self._overlay.values()])

    @cached_property
    def _whole_ids(self) -> dict[str, int]:
        return {self._text_of(i): i for i in self._controls} | self._ids

    @cached_property
    def _unwanted(self) -> re.Pattern[str]:
        """Special tokens that sentencepiece finds in a text by itself, being user-defined pieces."""
        specials = [AddedToken(self._text_of(i), i) for i in self.special_ids if i < len(self._model)]
        return _pattern(token for token in specials if token.id in self._model.encode(token.content))

    def _text_of(self, token_id: int) -> str:
        """How a text spells a special piece: CodeLlama's ``▁<PRE>`` is ``<PRE>`` there."""
        return self._pieces[token_id].lstrip(WORD_SPACE)

    def _encode_around_tokens(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in self._whole.finditer(text):
            ids += self._encode_text(text[end : match.start()], spaced=end == 0 or self._legacy)
            ids.append(self._whole_ids[match["token"]])
            end = match.end()
        return ids + self._encode_text(text[end:], spaced=end == 0 or self._legacy)

    def _encode_text(self, text: str, spaced: bool) -> list[int]:
        """Ids of a stretch of plain text; ``spaced``: with the model's own leading space, if it has one."""
        if not text:
            return []
        model = self._model if spaced or not self.strips_first_space else self._bare_model
        return list(model.encode(text))

    def _special_ids(self, settings: Settings) -> frozenset[int]:
        named = (self.token_to_id(text) for text in settings.special_texts)
        added = (i for i, token in self._overlay.items() if token.special)
        return frozenset([*self._controls, *added, *(i for i in named if i is not None)])

    def _strips_first_space(self) -> bool:
        """Asked of the model: it drops the leading space in decoding exactly when it puts one there in encoding."""
        words = (i for i, piece in enumerate(self._pieces) if WORD.match(piece))
        word = next(words, None)
        return word is not None and not str(self._model.decode([word])).startswith(" ")

    def _own_id(self, token_id: int) -> int | None:
        return token_id if token_id >= 0 else None


def _processor(path: Path, content: bytes) -> Any:
    import sentencepiece

    sentencepiece.set_min_log_level(ERRORS_ONLY)  # it writes to stderr otherwise, about models that are in order
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)
        return processor if len(processor) else _refuse(path)
    except RuntimeError as error:
        raise _unreadable(path) from error


def _pieces(path: Path, model: Any) -> list[str]:
    """The text of every piece. Raises ``CheckpointError``: one is not UTF-8, or a byte piece names no byte."""
    every = list(range(len(model)))
    try:
        pieces: list[str] = model.id_to_piece(every)
    except UnicodeDecodeError as error:
        raise _unreadable(path) from error
    bytes_alone = (piece for piece, is_byte in zip(pieces, model.is_byte(every), strict=True) if is_byte)
    if not all(map(BYTE_TOKEN.fullmatch, bytes_alone)):
        raise _unreadable(path)
    return pieces


def _refuse(path: Path) -> Any:
    raise _unreadable(path)


def _unreadable(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not a sentencepiece model; download or copy it again")


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Finds any of the tokens, the longest where several begin, in group ``token``; never matches without tokens."""
    ordered = sorted({t.content: t for t in tokens if t.content}.values(), key=lambda t: -len(t.content))
    if not ordered:
        return re.compile(r"(?P<token>(?!))")
    left = "|".join(rf"\s+(?={re.escape(t.content)})" for t in ordered if t.lstrip)
    right = "|".join(rf"(?<={re.escape(t.content)})\s+" for t in ordered if t.rstrip)
    token = "|".join(re.escape(t.content) for t in ordered)
    return re.compile(rf"(?:{left})?(?P<token>{token})(?:{right})?")


def _broken_inside(text: str, unwanted: re.Pattern[str]) -> Iterator[str]:
    """``text`` in parts such that no unwanted token is whole in any of them."""
    begin = 0
    for match in unwanted.finditer(text):
        yield text[begin : match.start() + 1]
        begin = match.start() + 1
    yield text[begin:]
