"""tiktoken's vocabulary files: Llama 3's ``tokenizer.model`` and Qwen's ``qwen.tiktoken``.

Each line holds a token in base64 and its rank. In a word, those neighbours are merged first whose result has the lowest
rank. The ``tokenizers`` library orders pairs instead. Each division of a token into two tokens becomes a merge, and the
merges have the order of the tokens' ranks.

The file has neither the rule that cuts texts into words nor special tokens; both are constants of the model family.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import DAMAGED, exists, read_bytes, read_json
from jaxdeploy.tokenizer.huggingface_file import END_OF_TEXT, QWEN2_SPLIT, byte_level_cut, byte_level_table

QWEN = "qwen.tiktoken"
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,9}", re.ASCII)
_LARGEST_FILE = 16 * 2**20
_LONGEST_TOKEN = 256
_MOST_MERGES = 2_000_000
"""Llama 3 has 280,000."""
_LLAMA3_SPECIALS = 256


@dataclass(frozen=True)
class Rules:
    """What a family adds to the file: ``split`` cuts texts into words; ``normal_form`` of Unicode; special tokens.

    ``begin`` is put in front of a text.
    """

    split: str
    specials: tuple[str, ...]
    normal_form: str | None = None
    begin: str | None = None


def is_tiktoken(content: bytes) -> bool:
    """Return whether a file with this ``content`` is in tiktoken's format."""
    return _LINE.fullmatch(content[:4096].split(b"\n", 1)[0].strip()) is not None


def describe_tiktoken(path: Path) -> dict[str, Any]:
    """Return the file as a description for the ``tokenizers`` library.

    Raises ``CheckpointError``: a line is damaged, a rank or a byte is missing.
    """
    ranks = _ranks(path)
    rules = _qwen() if path.name == QWEN else _llama3(path.parent)
    letters = {byte: letter for letter, byte in byte_level_table().items()}
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [[text[left], text[right]] for left, right in islice(_merges(ranks), _MOST_MERGES + 1)]
    if len(merges) > _MOST_MERGES:
        raise CheckpointError(f"{path}: has more than {_MOST_MERGES} merges; {DAMAGED}")
    specials = [_special(content, len(ranks) + index) for index, content in enumerate(rules.specials)]
    return {
        "version": "1.0",
        "added_tokens": specials,
        "normalizer": rules.normal_form and {"type": rules.normal_form},
        "pre_tokenizer": byte_level_cut(rules.split),
        "post_processor": rules.begin and _begins_with(rules.begin, len(ranks) + rules.specials.index(rules.begin)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": merges,
            "ignore_merges": True,
        },
    }


def _ranks(path: Path) -> dict[bytes, int]:
    """Return token → rank, in the order of ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, _LARGEST_FILE).split(b"\n"), 1):
        if not (line := line.strip()):
            continue
        if not _LINE.fullmatch(line):
            raise CheckpointError(f"{path}: line {number} is not a token in base64 and its rank; {DAMAGED}")
        encoded, rank = line.split(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise CheckpointError(f"{path}: line {number} is not base64 ({error}); {DAMAGED}") from error
        if not 0 < len(token) <= _LONGEST_TOKEN:
            raise CheckpointError(f"{path}: line {number} has a token of {len(token)} bytes; {DAMAGED}")
        ranks[token] = int(rank)
    ordered = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in ordered] != list(range(len(ordered))):
        raise CheckpointError(f"{path}: its ranks are not 0, 1, 2, ... without gaps; {DAMAGED}")
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{path}: has no token for byte {absent[0]}; {DAMAGED}")
    return {token: ranks[token] for token in ordered}


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Return every division of each token into two tokens, the lowest ranks first."""
    for token in ranks:
        divisions = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in divisions if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _qwen() -> Rules:
    specials = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
    return Rules(QWEN2_SPLIT, specials, normal_form="NFC")


def _llama3(folder: Path) -> Rules:
    """Return the rules of Llama 3 or 3.1, which names some reserved tokens; ``params.json`` identifies the release."""
    names = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    names[9] = "<|eot_id|>"
    params = read_json(folder / "params.json") if exists(folder / "params.json") else {"use_scaled_rope": True}
    if params.get("use_scaled_rope"):
        names |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(_LLAMA3_SPECIALS))
    specials = tuple(names.get(index) or next(reserved) for index in range(_LLAMA3_SPECIALS))
    return Rules(LLAMA3_SPLIT, specials, begin=names[0])


def _special(content: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True, **flags}


def _begins_with(token: str, token_id: int) -> dict[str, Any]:
    """Return a post-processor that puts ``token`` in front of a text."""
    begin, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
