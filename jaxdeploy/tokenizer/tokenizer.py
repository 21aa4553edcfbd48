"""The tokenizer of a checkpoint: one face for the file formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jaxdeploy.errors import CheckpointError, RequestError
from jaxdeploy.files.stored import exists, is_folder, read_bytes
from jaxdeploy.tokenizer.boundary import quiet_panics, refusing
from jaxdeploy.tokenizer.bounds import TokenBound
from jaxdeploy.tokenizer.detokenizer import Detokenizer, TokenBytes, decode
from jaxdeploy.tokenizer.huggingface_file import HuggingFaceFile, describe_byte_level, read_tokenizer_json
from jaxdeploy.tokenizer.sentencepiece_file import SentencePieceFile
from jaxdeploy.tokenizer.settings import DEFAULT, Settings, read_settings
from jaxdeploy.tokenizer.tiktoken_file import QWEN, describe_tiktoken, is_tiktoken
from jaxdeploy.unicode_text import well_formed

READABLE = "tokenizer.json, tokenizer.model, qwen.tiktoken, or vocab.json with merges.txt"
FOREIGN_FILES = ("tekken.json", "tokenizer.tiktoken", "tiktoken.model")


class TokenizerFile(TokenBytes, Protocol):
    """One file format. ``bos_id``, ``eos_id`` and the affixes are what the file itself says; settings may override."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    @property
    def bound(self) -> TokenBound:
        """How many tokens a text has at least."""
        ...

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

        ``tokenizer.json`` is preferred, then a model of sentencepiece or tiktoken, then GPT-2's ``vocab.json`` and
        ``merges.txt``.

        Raises:
            CheckpointError: no such file is there, or it is damaged.
        """
        path = Path(path)
        folder = path if is_folder(path) else path.parent
        fault = f"{path} holds a tokenizer that cannot be used"
        with refusing(CheckpointError, fault, "download it again"), quiet_panics():
            settings = read_settings(folder)
            return cls(_open(path, folder, settings), settings)

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``.

        ``add_bos``: put the tokenizer's own beginning and end around it (none for a tokenizer that has none).
        ``parse_special``: the text of a special token in ``text`` means that token; else it is text like any other.
        Lone surrogates are read as U+FFFD.
        """
        with refusing(RequestError, "the tokenizer cannot encode the text", "change it"):
            ids = self._file.encode(well_formed(text), parse_special)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_bos else ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that ``text`` has at least, which takes little time to find; 0 where none is known."""
        return self._file.bound.least(text)

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
        fallback = settings.fallback_ids.get(name, self.vocab_size)
        return own if own is not None or fallback >= self.vocab_size else fallback

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
    description = path if path.suffix == ".json" and exists(path) else folder / "tokenizer.json"
    model = _model_path(path, folder)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if exists(description) and (model is None or model != path):
        return HuggingFaceFile(read_tokenizer_json(description), settings, description)
    if model is not None:
        return _open_model(model, settings)
    if exists(vocab) and exists(merges):
        return HuggingFaceFile(describe_byte_level(vocab, merges, settings), settings, vocab)
    raise CheckpointError(_missing(path, folder))


def _open_model(path: Path, settings: Settings) -> TokenizerFile:
    """A file of sentencepiece's or of tiktoken's; Llama 2 and 3 have them under the same name."""
    content = read_bytes(path)
    if path.name == QWEN or is_tiktoken(content):
        return HuggingFaceFile(describe_tiktoken(path), settings, path)
    return SentencePieceFile(path, content, settings)


def _model_path(path: Path, folder: Path) -> Path | None:
    """``tokenizer.model``, the one file whose name has ``.model`` in it (``….model.v3``), or ``qwen.tiktoken``."""
    if not is_folder(path):
        return path if exists(path) and (".model" in path.name or path.name == QWEN) else None
    found = sorted(file for file in folder.glob("*.model*") if file.name not in FOREIGN_FILES)
    exact = [file for file in found if file.name == "tokenizer.model"]
    if len(exact or found) > 1 and not exists(folder / "tokenizer.json"):
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} holds several tokenizer models ({names}); name the one to use by its path")
    qwen = [folder / QWEN] if exists(folder / QWEN) else []
    return next(iter([*exact, *found, *qwen]), None)


def _missing(path: Path, folder: Path) -> str:
    foreign = [name for name in FOREIGN_FILES if exists(folder / name)]
    if foreign:
        return f"{folder / foreign[0]} is a format that is not read here; add the checkpoint's tokenizer.json beside it"
    if not exists(path):
        return f"{path} does not exist; give the folder that holds {READABLE}"
    return f"{path} holds no tokenizer; copy {READABLE} into it"
