"""tiktoken's files: ids are those of its algorithm, written out here, and of transformers' conversion of the file."""

from __future__ import annotations

import base64
import functools
import itertools
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json
from jaxdeploy.errors import CheckpointError
from jaxdeploy.tokenizer import Tokenizer
from jaxdeploy.tokenizer.huggingface_file import QWEN2_SPLIT, byte_level_table
from jaxdeploy.tokenizer.tiktoken_file import LLAMA3_SPLIT
from tests.torch_zip import write_torch_file

README = Path(__file__).parents[1] / "README.md"
TEXTS = [
    "",
    " ",
    "Hello world, it's 12345.67 o'clock!!",
    "  leading and   inner  \n\n\n spaces\t\r\n",
    "你好 café cafe\u0301 🦙🏽‍♀️ ﬁ ½ Ⅷ",
    "aaaaaaaaaaaaaaaaaaaaa bbbbbbbb ababababab",
    "\x00\x7f\u200b\ufeff",
    "x<|eot_id|>y <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|reserved_special_token_9|>",
]


@functools.cache
def ranks(split: str) -> dict[bytes, int]:
    """A vocabulary as tiktoken has it, trained on the README."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, byte_level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([README.read_text(encoding="utf-8"), *TEXTS * 3], trainer)
    byte_of = byte_level_table()
    return {bytes(byte_of[letter] for letter in token): rank for token, rank in trained.get_vocab().items()}


def write(path: Path, split: str = LLAMA3_SPLIT) -> Path:
    lines = sorted((rank, base64.b64encode(token).decode()) for token, rank in ranks(split).items())
    path.write_text("".join(f"{token} {rank}\n" for rank, token in lines))
    return path


def encoded(text: str, split: str) -> list[int]:
    """tiktoken's algorithm: of all neighbours in a word those are merged whose result has the lowest rank."""
    known, ids = ranks(split), []
    for word in regex.findall(split, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            pairs = [known.get(left + right, len(known)) for left, right in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] == len(known):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [known[part] for part in parts]
    return ids


def pieces(seed: int) -> str:
    """Random characters and fragments of the training text."""
    random = np.random.default_rng(seed)
    text = README.read_text(encoding="utf-8")
    starts = random.integers(0, len(text) - 20, 30)
    return "".join(text[at : at + random.integers(1, 12)] for at in starts) + chr(random.integers(0x20, 0x2FA0))


@pytest.mark.parametrize(("name", "split"), [("tokenizer.model", LLAMA3_SPLIT), ("qwen.tiktoken", QWEN2_SPLIT)])
def test_ids_are_those_of_tiktokens_algorithm(tmp_path: Path, name: str, split: str) -> None:
    write(tmp_path / name, split)
    tokenizer = Tokenizer.load(tmp_path)
    plain = [text for text in TEXTS if "<|" not in text and "\u0301" not in text]
    for given in [*plain, *map(pieces, range(200))]:
        text = unicodedata.normalize("NFC", given)
        ids = encoded(text, split)
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(path)
    names = [tokenizer.id_to_token(token) for token in range(len(ranks(LLAMA3_SPLIT)), tokenizer.vocab_size)]
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda _: ranks(LLAMA3_SPLIT)))
    other = TikTokenConverter(vocab_file=str(path), extra_special_tokens=names).converted()
    for text in (*TEXTS, *map(pieces, range(50))):
        assert tokenizer.encode(text, add_bos=False) == other.encode(text).ids
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    assert tokenizer.encode("x", parse_special=True)[0] == begin == tokenizer.bos_token_id
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|end_of_text|>")
    special = TEXTS[-1]
    literal = tokenizer.encode(special, add_bos=False, parse_special=False)
    assert not tokenizer.special_ids & set(literal)
    assert tokenizer.decode(literal) == special


@pytest.mark.parametrize(
    ("scaled", "expected"),
    [
        (True, {0: "<|begin_of_text|>", 4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>",
                8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>", 255: "<|reserved_special_token_247|>"}),
        (False, {1: "<|end_of_text|>", 2: "<|reserved_special_token_0|>", 6: "<|start_header_id|>",
                 8: "<|reserved_special_token_4|>", 9: "<|eot_id|>", 255: "<|reserved_special_token_250|>"}),
    ],
    ids=["3.1", "3"],
)  # fmt: skip
def test_a_folder_of_metas(tmp_path: Path, scaled: bool, expected: Mapping[int, str]) -> None:
    write(tmp_path / "tokenizer.model")
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}
    put_json(tmp_path / "params.json", {**sizes, "rope_theta": 500000.0, "use_scaled_rope": scaled})
    size = len(ranks(LLAMA3_SPLIT)) + 256
    weights = {"tok_embeddings.weight": np.zeros((size, 16), np.float32)}
    write_torch_file(tmp_path / "consolidated.00.pth", weights)
    tokenizer = Tokenizer.load(tmp_path)
    assert read_hf_config(tmp_path, "llama")["vocab_size"] == tokenizer.vocab_size == size
    assert not open_checkpoint(tmp_path, "llama").faults
    found = {number: tokenizer.id_to_token(size - 256 + number) for number in expected}
    assert found == expected
    assert set(range(size - 256, size)) <= tokenizer.special_ids


def test_qwens_special_tokens(tmp_path: Path) -> None:
    write(tmp_path / "qwen.tiktoken", QWEN2_SPLIT)
    tokenizer, first = Tokenizer.load(tmp_path), len(ranks(QWEN2_SPLIT))
    named = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<|extra_0|>", 207: "<|extra_204|>"}
    assert {number: tokenizer.id_to_token(first + number) for number in named} == named
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (first + 208, None, first)
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9"), "texts are in normal form C"


def test_a_vocabulary_without_a_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.model")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("QQ== ")]
    path.write_text("\n".join(f"{line.split()[0]} {rank}" for rank, line in enumerate(lines)))
    with pytest.raises(CheckpointError, match="has no token for byte 65; download it again"):
        Tokenizer.load(path)
