from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.tokenizer import Tokenizer
from tests.test_tokenizer import (
    INTERNLM,
    MISTRAL_V1,
    MISTRAL_V3,
    train_byte_level,
    train_sentencepiece,
    vector_inputs,
)

REAL = ["llama2/tokenizer.model", "gpt2", INTERNLM, MISTRAL_V1, MISTRAL_V3]
UNFINISHED = "�"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Sentencepiece: a dummy prefix, byte tokens, one user-defined piece."""
    return Tokenizer.load(train_sentencepiece(tmp_path_factory.mktemp("pieces"), ["<mark>"]))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE: any token may end inside a character."""
    return Tokenizer.load(train_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """One description, read by us and by the ``tokenizers`` library."""
    folder = train_byte_level(tmp_path_factory.mktemp("library"))
    return Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def streamed(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> str:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt_ids=prompt)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


def byte_ids(tokenizer: Tokenizer, content: bytes) -> list[int]:
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in content]
    return [i for i in ids if i is not None]


@pytest.mark.parametrize("file", REAL)
def test_streamed_equals_at_once_for_every_vector(shared: Path, file: str) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / file)
    for text in vector_inputs(shared):
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("file", REAL)
@pytest.mark.parametrize("skip", [True, False])
def test_streamed_equals_at_once_for_random_ids_of_real_vocabularies(shared: Path, file: str, skip: bool) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / file)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 400), max_size=24))
    def check(ids: list[int]) -> None:
        assert streamed(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-1, 350), max_size=40), skip=st.booleans(), spaces=st.booleans())
def test_streamed_equals_at_once(
    pieces: Tokenizer, byte_level: Tokenizer, ids: list[int], skip: bool, spaces: bool
) -> None:
    for tokenizer in (pieces, byte_level):
        stream = tokenizer.detokenizer(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        parts = [*map(stream.push, ids), stream.flush()]
        whole = tokenizer.decode(ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        assert "".join(parts) == whole


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=24))
def test_any_bytes_read_as_python_reads_them(pieces: Tokenizer, content: bytes) -> None:
    ids = byte_ids(pieces, content)
    expected = content.decode("utf-8", errors="replace").removeprefix(" ")
    assert streamed(pieces, ids) == pieces.decode(ids) == expected


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=24))
def test_byte_level_text_equals_the_tokenizers_librarys(library: tuple[Tokenizer, Any], ids: list[int]) -> None:
    ours, theirs = library
    assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_comes_back(pieces: Tokenizer, byte_level: Tokenizer, text: str) -> None:
    text = text.replace("▁", "_").replace("\0", "")  # sentencepiece's own sign for a space, and its end of text
    for tokenizer in (pieces, byte_level):
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


def test_a_character_is_held_back_until_it_is_whole(pieces: Tokenizer) -> None:
    detokenizer = pieces.detokenizer()
    ids = byte_ids(pieces, "🦙".encode())
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "🦙"]
    assert detokenizer.flush() == ""


def test_a_broken_character_becomes_a_replacement_sign(pieces: Tokenizer) -> None:
    first, second, *_ = byte_ids(pieces, "🦙".encode())
    detokenizer = pieces.detokenizer()
    letter = pieces.token_to_id("a") or -1
    assert [detokenizer.push(i) for i in (first, second, letter, first)] == ["", "", f"{UNFINISHED}a", ""]
    assert detokenizer.flush() == UNFINISHED


def test_a_skipped_token_inside_a_character_does_not_break_it(pieces: Tokenizer) -> None:
    ids = byte_ids(pieces, "é".encode())
    assert streamed(pieces, [ids[0], 1, ids[1]]) == "é"
    assert streamed(pieces, [ids[0], 1, ids[1]], skip=False) == f"{UNFINISHED} <s> {UNFINISHED}"


def test_leading_space_goes_where_the_text_begins_and_stays_after_a_prompt(pieces: Tokenizer) -> None:
    ids = pieces.encode("Once upon", add_bos=False)
    assert streamed(pieces, ids) == "Once upon"
    assert streamed(pieces, ids, prompt=[1]) == "Once upon"
    assert streamed(pieces, ids, prompt=pieces.encode("a")) == " Once upon"


def test_a_character_begun_in_the_prompt_is_finished(pieces: Tokenizer) -> None:
    ids = byte_ids(pieces, "🦙".encode())
    assert streamed(pieces, ids[2:], prompt=[1, *pieces.encode("a"), *ids[:2]]) == "🦙"


def test_special_tokens_that_are_shown(pieces: Tokenizer, byte_level: Tokenizer) -> None:
    ids = [*pieces.encode("Once"), 2]
    assert pieces.decode(ids, skip_special_tokens=False) == "<s> Once </s>"
    assert pieces.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False) == "<s> Once</s>"
    ids = byte_level.encode("<s>Once</s>")
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>Once</s>"


def test_the_stories_of_a_real_model_read_well(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "assets/models/stories260K")
    golden = (shared / "assets/models/stories260K/golden_greedy.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(golden, add_bos=False)
    assert streamed(tokenizer, ids, prompt=[1]) == tokenizer.decode(ids) == golden
