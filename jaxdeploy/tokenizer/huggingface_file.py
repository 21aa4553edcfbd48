"""A ``tokenizer.json``, or GPT-2's ``vocab.json`` and ``merges.txt``, through the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import read_text
from jaxdeploy.tokenizer.boundary import refusing
from jaxdeploy.tokenizer.bounds import TokenBound, bound_of_description
from jaxdeploy.tokenizer.growth import check_growth
from jaxdeploy.tokenizer.settings import MAX_ID, AddedToken, Settings, read_json

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = ("</s>", END_OF_TEXT, "<|end_of_text|>", "<eos>", "<|im_end|>")
QUICKLY_ENCODED = 4096
"""Characters that are encoded in a few milliseconds."""
MAX_CACHED_TOKENS = 2**16
"""Tokens whose bytes are kept, about 100 bytes of memory each."""
MAX_TOKENS = 2**19
"""Twice the largest vocabulary that is known."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_CLASSES: dict[str | None, str | None] = {None: None, "GPT2Tokenizer": None, "Qwen2Tokenizer": QWEN2_SPLIT}
"""Where only ``vocab.json`` and ``merges.txt`` are there: tokenizer class → how it cuts words (None: GPT-2's way)."""


class HuggingFaceFile:
    """Vocabulary and encoder of a ``tokenizers`` description, with what ``tokenizer_config.json`` adds to it.

    Raises:
        CheckpointError: the description is damaged, or decodes in a way that is not known here.
    """

    spaces_specials = False

    def __init__(self, description: dict[str, Any], settings: Settings, path: Path) -> None:
        self._path = path
        _check_size(description, path)
        self._description = _with_added(description, settings.added)
        self._encoder = self._build()
        self._check_ids(settings.added)
        self._added = self._encoder.get_added_tokens_decoder()
        self._rules = DecoderRules.read(self._description.get("decoder"), path)
        self.bytes_of = lru_cache(MAX_CACHED_TOKENS)(self._compute_bytes)
        """Returns the UTF-8 text of a token; added tokens are written as they are."""
        self.strips_first_space = self._rules.strips_first_space
        self.vocab_size = 1 + max(self._encoder.get_vocab(with_added_tokens=True).values())
        if self.vocab_size > MAX_ID:
            raise CheckpointError(f"{path}: has a token with id {self.vocab_size - 1}, {MAX_ID} at most; mend it")
        self.special_ids = self._special_ids(settings)
        self.prefix_ids, self.suffix_ids = self._affixes()
        self.bos_id = self.prefix_ids[0] if len(self.prefix_ids) == 1 else None
        self.eos_id = next((i for i in map(self.token_to_id, USUAL_ENDS) if i in self._added), None)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of ``text`` alone, with tokens kept whole where their text stands in it, or split apart like any text."""
        encoder = self._encoder if parse_special else self._literal_encoder
        if len(text) <= QUICKLY_ENCODED:
            return list(encoder.encode(text, add_special_tokens=False).ids)
        (found,) = encoder.encode_batch_fast([text], add_special_tokens=False)  # this one releases the GIL
        return list(found.ids)

    def id_to_token(self, token_id: int) -> str:
        """The token's text as the vocabulary writes it; empty for an id outside it."""
        return (self._encoder.id_to_token(token_id) or "") if token_id >= 0 else ""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is none."""
        token_id = self._encoder.token_to_id(token)
        return None if token_id is None else int(token_id)

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        return token.encode() if token_id in self._added else self._rules.bytes_of(token)

    @cached_property
    def bound(self) -> TokenBound:
        """How many tokens a text has at least."""
        ids = range(self.vocab_size)
        texts = map(self.id_to_token, ids)
        return bound_of_description(self._description, self._added.values(), map(self._compute_bytes, ids), texts)

    @cached_property
    def _literal_encoder(self) -> Any:
        """Another instance, since the switch is part of the instance's state and requests run side by side."""
        encoder = self._build()
        encoder.encode_special_tokens = True
        return encoder

    def _build(self) -> Any:
        import tokenizers

        fault = f"{self._path} is not a tokenizer that the tokenizers library can read"
        with refusing(CheckpointError, fault, "download or copy it again"):
            encoder = tokenizers.Tokenizer.from_str(json.dumps(self._description))
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def _check_ids(self, added: tuple[AddedToken, ...]) -> None:
        """The library numbers tokens beyond the vocabulary by itself, which goes wrong where ids are left out."""
        faults = [f"{t.content}={t.id}" for t in added if self.token_to_id(t.content) != t.id]
        if faults:
            fault = f"{self._path}: the added tokens {', '.join(faults)} do not continue its vocabulary"
            raise CheckpointError(f"{fault}; mend added_tokens_decoder in tokenizer_config.json")

    def _special_ids(self, settings: Settings) -> frozenset[int]:
        named = (self.token_to_id(text) for text in settings.special_texts)
        added = (i for i, token in self._added.items() if token.special)
        return frozenset([*added, *(i for i in named if i is not None)])

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the description's own post-processor puts around a text."""
        bare, full = (self._encoder.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        begin = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
        return tuple(full[:begin]), tuple(full[begin + len(bare) :])


class DecoderRules:
    """How a description turns the text of a vocabulary entry into bytes."""

    def __init__(self, steps: list[Mapping[str, Any]]) -> None:
        kinds = {str(step["type"]) for step in steps}
        self._byte_of = byte_level_table() if "ByteLevel" in kinds else None
        self._byte_tokens = "ByteFallback" in kinds
        self._replacements = [_replacement(s) for s in steps if s["type"] in ("Replace", "Metaspace")]
        self.strips_first_space = any(_strips(step) for step in steps)

    @classmethod
    def read(cls, decoder: Mapping[str, Any] | None, path: Path) -> DecoderRules:
        """From the description's ``decoder``.

        Raises:
            CheckpointError: a step is of a kind that language models with a byte-exact decoder do not use.
        """
        steps = _flat(decoder)
        unknown = [str(step["type"]) for step in steps if not _known(step)]
        if unknown:
            fault = f"{path}: decoder={', '.join(unknown)} is not supported"
            raise CheckpointError(f"{fault}; use a checkpoint with a ByteLevel, ByteFallback or Metaspace decoder")
        return cls(steps)

    def bytes_of(self, token: str) -> bytes:
        """The bytes of one entry's text."""
        if self._byte_of is not None:
            return _byte_level(token, self._byte_of)
        if self._byte_tokens and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _check_size(description: Mapping[str, Any], path: Path) -> None:
    """Raise ``CheckpointError`` for a vocabulary that takes too much memory and time to build."""
    vocab = description["model"].get("vocab") or ()
    if len(vocab) > MAX_TOKENS:
        raise CheckpointError(f"{path}: has {len(vocab)} tokens, {MAX_TOKENS} at most; download or copy it again")


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The description in a ``tokenizer.json``."""
    description = read_json(path)
    if not isinstance(description.get("model"), dict):
        raise CheckpointError(f"{path} describes no tokenizer model; download or copy it again")
    check_growth(description, path)
    return description


def describe_byte_level(vocab: Path, merges: Path, settings: Settings) -> dict[str, Any]:
    """The description of GPT-2's byte-level BPE (and Qwen2's, which cuts words differently) from its two files.

    Raises:
        CheckpointError: the class is another one, whose rules the two files do not tell.
    """
    name = settings.tokenizer_class and settings.tokenizer_class.removesuffix("Fast")
    if name not in BYTE_LEVEL_CLASSES:
        fault = f"tokenizer_class={name} cannot be built from {vocab.name} and {merges.name} alone"
        raise CheckpointError(f"{vocab.parent}: {fault}; add the checkpoint's tokenizer.json")
    lines = read_text(merges).splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    ids = read_json(vocab)
    split = BYTE_LEVEL_CLASSES[name]
    return {
        "version": "1.0",
        "added_tokens": [_added_json(AddedToken(END_OF_TEXT, ids[END_OF_TEXT]))] if END_OF_TEXT in ids else [],
        "normalizer": None if split is None else {"type": "NFC"},
        "pre_tokenizer": byte_level_cut(split),
        "post_processor": None,
        "decoder": _byte_level_step(use_regex=True),
        "model": {"type": "BPE", "vocab": ids, "merges": pairs, "byte_fallback": False},
    }


def _byte_level_step(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def byte_level_cut(split: str | None) -> dict[str, Any]:
    """A pre-tokenizer that cuts words by the expression ``split`` (None: GPT-2's) and maps bytes to letters."""
    if split is None:
        return _byte_level_step(use_regex=True)
    cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _byte_level_step(use_regex=False)]}


def _added_json(token: AddedToken) -> dict[str, Any]:
    return {**asdict(token), "single_word": False, "normalized": False}


def _with_added(description: dict[str, Any], added: tuple[AddedToken, ...]) -> dict[str, Any]:
    """The description with the tokens it lacks; one that takes over an id gives that vocabulary entry its text."""
    present = description.get("added_tokens") or ()
    known = {token["content"]: token["id"] for token in present}
    texts = {token.id: token.content for token in added if known.get(token.content) != token.id}
    if not texts:
        return description
    kept = [t for t in present if t["id"] not in texts and t["content"] not in texts.values()]
    tokens = kept + [_added_json(token) for token in added if token.id in texts]
    model = dict(description["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {texts.get(token_id, text): token_id for text, token_id in model["vocab"].items()}
    return {**description, "model": model, "added_tokens": sorted(tokens, key=lambda t: int(t["id"]))}


def _flat(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in _flat(part)]
    return [decoder]


def _known(step: Mapping[str, Any]) -> bool:
    kind = str(step["type"])
    if kind == "Replace":
        return "String" in step["pattern"]
    if kind == "Strip":
        return bool(step["content"] == " " and step["start"] <= 1 and step["stop"] == 0)
    return kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")


def _strips(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True))
    return bool(step["type"] == "Strip" and step["start"] == 1)


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return str(step["replacement"]), " "
    return str(step["pattern"]["String"]), str(step["content"])


def _byte_level(token: str, byte_of: Mapping[str, int]) -> bytes:
    """Characters outside the table can only be plain text that was put into the vocabulary as it is."""
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:
        return token.encode()


def byte_level_table() -> dict[str, int]:
    """GPT-2's printable character → byte: printable bytes stand for themselves, the others for 256, 257, …"""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
