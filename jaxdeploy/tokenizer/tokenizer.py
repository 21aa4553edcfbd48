"""The tokenizer of a checkpoint: one face for the file formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jaxdeploy.errors import CheckpointError
from jaxdeploy.tokenizer.detokenizer import Detokenizer, TokenBytes, decode
from jaxdeploy.tokenizer.huggingface_file import HuggingFaceFile, describe_byte_level, read_tokenizer_json
from jaxdeploy.tokenizer.sentencepiece_file import SentencePieceFile
from jaxdeploy.tokenizer.settings import DEFAULT, Settings, read_settings
from jaxdeploy.unicode_text import well_formed

READABLE = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
FOREIGN_FILES = ("qwen.tiktoken", "tekken.json", "tokenizer.tiktoken", "tiktoken.model")


class TokenizerFile(TokenBytes, Protocol):
    """One file format. ``bos_id``, ``eos_id`` and the affixes are what the file itself says; settings may override."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of ``text`` alone."""
        ...

    def id_to_token(self, token_id: int) -> str:
        """The token's text as the vocabulary writes it."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text."""
        ...


class Tokenizer:
    """Encodes and decodes with a checkpoint's vocabulary.

    ``vocab_size`` is one more than the largest id: the embedding may have more rows. ``special_tokens`` maps
    ``bos_token``, ``eos_token`` … to their texts, as chat templates want them. ``chat_templates`` are Jinja sources by
    name, ``chat_template`` is the default one. ``prefix_ids`` and ``suffix_ids``
    are what ``encode`` puts around a text by the tokenizer's own rule.
    """

    def __init__(self, file: TokenizerFile, settings: Settings) -> None:
        self._file = file
        self.vocab_size = file.vocab_size
        self.chat_templates = settings.chat_templates
        self.chat_template = settings.chat_templates.get(DEFAULT)
        self.bos_token_id = self._named_id("bos_token", settings, file.bos_id)
        self.eos_token_id = self._named_id("eos_token", settings, file.eos_id)
        self.special_tokens = {**settings.named, **self._ends()}
        self.prefix_ids = _affix(file.prefix_ids, self.bos_token_id, settings.add_bos)
        self.suffix_ids = _affix(file.suffix_ids, self.eos_token_id, settings.add_eos)
        ends = {self.bos_token_id, self.eos_token_id} - {None}
        file.special_ids = self.special_ids = file.special_ids | {i for i in ends if i is not None}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint's folder, or one tokenizer file with what lies beside it. Runs no code of the checkpoint.

        ``tokenizer.json`` is preferred, then a sentencepiece model, then GPT-2's ``vocab.json`` and ``merges.txt``.

        Raises:
            CheckpointError: no such file is there, or it is damaged.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        settings = read_settings(folder)
        return cls(_open(path, folder, settings), settings)

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``.

        ``add_bos``: put the tokenizer's own beginning and end around it (none for a tokenizer that has none).
        ``parse_special``: the text of a special token in ``text`` means that token; else it is text like any other.
        Lone surrogates are read as U+FFFD.
        """
        ids = self._file.encode(well_formed(text), parse_special)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_bos else ids

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        ``spaces_between_special_tokens`` matters for special tokens that are shown, and only with a sentencepiece
        model: as in transformers, ``tokenizer.json`` has no such spaces.
        """
        spaces = spaces_between_special_tokens
        return decode(self._file, ids, skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces)

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> Detokenizer:
        """Decode a stream; ``prompt_ids`` are the tokens shown before it (see ``Detokenizer``)."""
        return Detokenizer(
            self._file,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            prompt_ids=prompt_ids,
        )

    def id_to_token(self, token_id: int) -> str:
        """The token's text as the vocabulary writes it; empty for an id outside it."""
        return self._file.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is none."""
        return self._file.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, its leading space included; may be part of a character."""
        return self._file.bytes_of(token_id)

    def _named_id(self, name: str, settings: Settings, own: int | None) -> int | None:
        """By the name that the settings give, else by the file itself, else by the model's configuration."""
        if name in settings.named and (token_id := self._file.token_to_id(settings.named[name])) is not None:
            return token_id
        return settings.fallback_ids.get(name) if own is None else own

    def _ends(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        return {name: text for name, i in ids.items() if i is not None and (text := self.id_to_token(i))}


def _affix(own: tuple[int, ...], token_id: int | None, wanted: bool | None) -> tuple[int, ...]:
    """The file's own affix, with or without the token as the settings say; as it is where they are silent."""
    if wanted is None or token_id is None:
        return own
    others = tuple(i for i in own if i != token_id)
    if not wanted:
        return others
    return own if token_id in own else (token_id, *own)


def _open(path: Path, folder: Path, settings: Settings) -> TokenizerFile:
    description = path if path.suffix == ".json" and path.is_file() else folder / "tokenizer.json"
    model = _sentencepiece_path(path, folder)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if description.is_file() and (model is None or model != path):
        return HuggingFaceFile(read_tokenizer_json(description), settings, description)
    if model is not None:
        return SentencePieceFile(model, settings)
    if vocab.is_file() and merges.is_file():
        return HuggingFaceFile(describe_byte_level(vocab, merges, settings), settings, vocab)
    raise CheckpointError(_missing(path, folder))


def _sentencepiece_path(path: Path, folder: Path) -> Path | None:
    """``tokenizer.model``, or the one file whose name has ``.model`` in it (``….model.v3``)."""
    if path.is_file():
        return path if ".model" in path.name else None
    found = sorted(file for file in folder.glob("*.model*") if file.name not in FOREIGN_FILES and file.is_file())
    exact = [file for file in found if file.name == "tokenizer.model"]
    if len(exact or found) > 1 and not (folder / "tokenizer.json").is_file():
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} holds several tokenizer models ({names}); name the one to use by its path")
    return next(iter(exact or found), None)


def _missing(path: Path, folder: Path) -> str:
    foreign = [name for name in FOREIGN_FILES if (folder / name).is_file()]
    if foreign:
        return f"{folder / foreign[0]} is a format that is not read here; add the checkpoint's tokenizer.json beside it"
    if not path.exists():
        return f"{path} does not exist; give the folder that holds {READABLE}"
    return f"{path} holds no tokenizer; copy {READABLE} into it"
