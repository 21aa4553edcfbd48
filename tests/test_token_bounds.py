"""Lower bounds on the tokens of a text never exceed the real number of tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.bundled import bundled_model
from jaxdeploy.tokenizer import Tokenizer
from jaxdeploy.tokenizer.bounds import TokenBound, bound_of_description

PIECES = [" ", "  ", "\n", "-", "=", "\u2581", "ab", " the", "\u212a", "x", "e\u0301", "\u65e5", "\U0001f600"]
STEPS: dict[str, dict[str, Any]] = {
    "NFC": {"type": "NFC"},
    "spaces": {"type": "Replace", "pattern": {"String": "  "}, "content": " "},
    "nothing": {"type": "Replace", "pattern": {"String": "a"}, "content": ""},
    "accents": {"type": "StripAccents"},
}


def check(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    tokens = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.vocab_size)]
    texts = [piece * 500 for piece in PIECES] + [token * 20 for token in sorted(tokens, key=len)[-10:]]
    texts += ["".join(draw.choices(pieces, k=50)) for pieces in (PIECES, tokens) for _ in range(50)]
    for text in texts:
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_bos=False)), text
    assert tokenizer.least_tokens("word" * 100_000) > 1000


def test_the_bundled_tokenizer() -> None:
    check(Tokenizer.load(bundled_model()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama2", "internlm", "mistral/tokenizer.model.v1"])
def test_others(shared: Path, name: str) -> None:
    check(Tokenizer.load(shared / "assets/tokenizers" / name))


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, TokenBound(3)),
        ({"normalizer": STEPS["NFC"]}, TokenBound(12)),
        ({"normalizer": {"type": "Sequence", "normalizers": [STEPS["NFC"], STEPS["spaces"]]}}, TokenBound(24)),
        ({"normalizer": STEPS["nothing"]}, TokenBound()),
        ({"normalizer": STEPS["accents"]}, TokenBound()),
        ({"pre_tokenizer": {"type": "Whitespace"}}, TokenBound(4, False)),
        ({"pre_tokenizer": {"type": "CharDelimiterSplit"}}, TokenBound()),
        ({"model": {"type": "BPE", "unk_token": "?"}, "pre_tokenizer": None}, TokenBound()),
    ],
)
def test_what_a_tokenizer_may_drop(changes: dict[str, Any], bound: TokenBound) -> None:
    plain = {"model": {"type": "BPE", "byte_fallback": True}, "pre_tokenizer": {"type": "ByteLevel"}}
    assert bound_of_description({**plain, **changes}, [], [b"a", b"abc"], ["a", "abcd"]) == bound
