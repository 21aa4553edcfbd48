from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from jaxdeploy.bundled import bundled_model
from jaxdeploy.errors import CheckpointError
from jaxdeploy.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little girl.",
    "She liked to play in the park, 3 days a week!",
    "你好 café 🦙",
] * 8
UNUSED = [f"[UNUSED_TOKEN_{n}]" for n in range(141, 147)]
INTERNLM = "internlm/tokenizer.model"
MISTRAL_V1 = "mistral/tokenizer.model.v1"
MISTRAL_V3 = "mistral/mistral_instruct_tokenizer_240323.model.v3"


def vector_inputs(shared: Path) -> list[str]:
    content = (shared / "assets/tokenizers/vectors/inputs.inp").read_bytes().decode("utf-8")
    return content.split("\n__ggml_vocab_test__\n")


def vector_ids(shared: Path, name: str) -> list[list[int]]:
    lines = (shared / f"assets/tokenizers/vectors/{name}.out").read_text(encoding="utf-8").split("\n")
    return [[int(number) for number in line.split()] for line in lines]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def train_sentencepiece(folder: Path, symbols: Sequence[str] = (), dummy_prefix: bool = True) -> Path:
    """A tiny model with byte fallback; ``symbols`` become user-defined pieces."""
    path = folder / "tokenizer.model"
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=340 + len(symbols), model_type="bpe",
            byte_fallback=True, add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False, minloglevel=2,
            normalization_rule_name="identity", user_defined_symbols=list(symbols), hard_vocab_limit=False,
        )  # fmt: skip
    return folder


def train_byte_level(folder: Path) -> Path:
    """A tiny ``tokenizer.json`` in GPT-2's manner, with three special tokens."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "[UNUSED]"], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_published_vectors(shared: Path, name: str) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / name)
    got = [tokenizer.encode(text, add_bos=False) for text in vector_inputs(shared)]
    assert len(got) == 47
    assert got == vector_ids(shared, name)


@pytest.mark.parametrize("file", ["llama2/tokenizer.model", INTERNLM, MISTRAL_V1, MISTRAL_V3])
def test_ids_and_texts_equal_the_sentencepiece_librarys(shared: Path, file: str) -> None:
    path = shared / "assets/tokenizers" / file
    tokenizer, library = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = vector_inputs(shared)
    assert [tokenizer.encode(text, add_bos=False) for text in texts] == [library.encode(text) for text in texts]
    for text in texts:
        assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text)) == text


@pytest.mark.parametrize("name", ["llama2", "gpt2", "internlm"])
def test_vectors_decode_to_the_text_they_came_from(shared: Path, name: str) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / name)
    for text in vector_inputs(shared):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("file", "token", "token_id"),
    [
        ("llama2/tokenizer.model", "</s>", 2),
        ("gpt2", "<|endoftext|>", 50256),
        (INTERNLM, "</s>", 2),
        (INTERNLM, "<eoa>", 103028),
        (MISTRAL_V3, "[INST]", 3),
        (MISTRAL_V3, "[TOOL_CALLS]", 5),
    ],
)
def test_special_tokens_stay_whole(shared: Path, file: str, token: str, token_id: int) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / file)
    ids = tokenizer.encode(f"one{token}two {token}", add_bos=False)
    assert ids.count(token_id) == 2
    assert tokenizer.token_to_id(token) == token_id
    assert tokenizer.id_to_token(token_id) == token


@pytest.mark.parametrize("file", ["llama2/tokenizer.model", "gpt2", MISTRAL_V3])
def test_special_text_is_ordinary_text_on_demand(shared: Path, file: str) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / file)
    text = "one</s>two <|endoftext|> [INST]<s>"
    ids = tokenizer.encode(text, add_bos=False, parse_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == text


def test_both_files_of_a_real_model_agree(shared: Path) -> None:
    folder = shared / "assets/models/stories260K"
    described, model = Tokenizer.load(folder), Tokenizer.load(folder / "tokenizer.model")
    text = (shared / "assets/text/tinystories_sample.txt").read_text(encoding="utf-8")
    assert described.encode(text) == model.encode(text)
    assert described.decode(described.encode(text)) == text
    assert (described.bos_token_id, described.eos_token_id, described.vocab_size) == (1, 2, 512)
    assert described.encode("") == [1]


def test_internlm2_names_are_laid_over_by_id(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path, UNUSED, dummy_prefix=False)
    plain = Tokenizer.load(folder)
    ids = [plain.token_to_id(piece) for piece in UNUSED]
    names = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
    added = {str(i): {"content": name, "special": True} for i, name in zip(ids, names, strict=True)}
    auto_map = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    config = {"added_tokens_decoder": added, "auto_map": auto_map, "tokenizer_class": "InternLM2Tokenizer"}
    write_json(folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.token_to_id(name) for name in names] == ids
    encoded = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n", add_bos=False)
    assert (encoded[0], encoded.count(ids[4] or -1)) == (ids[5], 1)
    assert tokenizer.decode(encoded) == "user\nhi\n"
    literal = tokenizer.encode("a<|im_end|>[UNUSED_TOKEN_145]", parse_special=False)
    assert not tokenizer.special_ids & set(literal[1:])


def test_the_same_overlay_on_a_tokenizer_json(tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path)
    end, new = Tokenizer.load(folder).token_to_id("[UNUSED]"), Tokenizer.load(folder).vocab_size
    added = {str(end): {"content": "<|im_end|>", "special": True}, str(new): {"content": "<new>"}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": "</s>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<|im_end|><new>") == [end, new]
    assert tokenizer.decode(tokenizer.encode("<|im_end|><new>")) == "<new>"
    assert tokenizer.token_to_id("[UNUSED]") is None
    assert tokenizer.special_tokens["eos_token"] == "</s>"


def test_an_added_token_whose_id_leaves_a_gap_is_refused(tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path)
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"5000": {"content": "<far>"}}})
    with pytest.raises(CheckpointError, match="<far>=5000"):
        Tokenizer.load(folder)


def test_a_bare_sentencepiece_model_begins_with_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(train_sentencepiece(tmp_path))
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    assert 1 not in tokenizer.encode("a", add_bos=False)


@pytest.mark.parametrize("train", [train_sentencepiece, train_byte_level])
def test_affix_flags_of_the_config_are_respected(tmp_path: Path, train: Any) -> None:
    folder = train(tmp_path)
    flags = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": False, "add_eos_token": True}
    write_json(folder / "tokenizer_config.json", flags)
    without = Tokenizer.load(folder)
    assert without.encode("a") == [*without.encode("a", add_bos=False), without.eos_token_id]
    write_json(folder / "tokenizer_config.json", {**flags, "add_bos_token": True, "add_eos_token": False})
    with_bos = Tokenizer.load(folder)
    assert with_bos.encode("a") == [with_bos.bos_token_id, *with_bos.encode("a", add_bos=False)]


def test_the_post_processor_of_a_tokenizer_json_counts(tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path)
    described = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    described.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    described.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids, tokenizer.bos_token_id) == ((0,), (1,), 0)


def test_text_after_a_special_token_gets_a_space_unless_legacy_is_off(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path)
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode("a</s>a")) == "a a"
    write_json(folder / "tokenizer_config.json", {"legacy": False})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("a</s>a")) == "aa"
    assert tokenizer.encode("a </s>", add_bos=False)[:-1] == tokenizer.encode("a ", add_bos=False)


def test_white_space_that_belongs_to_an_added_token(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path, ["<end>"])
    token_id = Tokenizer.load(folder).token_to_id("<end>")
    token = {"content": "<end>", "special": True, "lstrip": True, "rstrip": True}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(token_id): token}})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a  <end> \nb") == tokenizer.encode("a<end>b")


def test_ends_come_from_the_models_configuration_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path)
    write_json(folder / "config.json", {"bos_token_id": 0, "eos_token_id": [7, 8]})
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "</s>"})
    assert Tokenizer.load(folder).bos_token_id == 1


def test_gpt2s_two_files_equal_the_description_made_from_them(tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path)
    described = Tokenizer.load(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    built = Tokenizer.load(folder)
    for text in [*CORPUS[:3], "unseen ☃ words\n\n  and spaces"]:
        assert built.encode(text) == described.encode(text)
    assert built.prefix_ids == ()
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "SomeTokenizerFast"})
    with pytest.raises(CheckpointError, match=r"tokenizer_class=SomeTokenizer .*add the checkpoint's tokenizer\.json"):
        Tokenizer.load(folder)


def test_qwen2s_two_files_cut_words_in_its_own_way(tmp_path: Path, shared: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "assets/tokenizers/gpt2" / name, tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    ids = Tokenizer.load(tmp_path).encode("in 1234")
    assert [Tokenizer.load(tmp_path).id_to_token(i) for i in ids] == ["in", "Ġ", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "own"}, "own"),
        ({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}, "D"),
        ({"chat_template": [{"name": "rag", "template": "R"}]}, None),
        ({}, None),
    ],
)
def test_where_the_chat_template_comes_from(tmp_path: Path, config: dict[str, Any], expected: str | None) -> None:
    folder = train_byte_level(tmp_path)
    write_json(folder / "tokenizer_config.json", config)
    assert Tokenizer.load(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert Tokenizer.load(folder).chat_template == "file"


def test_ids_outside_the_vocabulary_are_silent(tmp_path: Path) -> None:
    for tokenizer in (Tokenizer.load(train_sentencepiece(tmp_path)), Tokenizer.load(train_byte_level(tmp_path))):
        assert tokenizer.id_to_token(10**6) == tokenizer.id_to_token(-1) == ""
        assert tokenizer.decode([10**6, -1]) == ""
        assert tokenizer.token_to_id("no such token") is None


def damaged(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", "holds no tokenizer; copy tokenizer.json"),
        ("tokenizer.json", "{", "is not JSON"),
        ("tokenizer.json", "[]", "is not a JSON object"),
        ("tokenizer.json", "{}", "describes no tokenizer model"),
        ("tokenizer.json", '{"model": {"type": "Odd"}}', "is not a tokenizer that the tokenizers library can read"),
        ("tokenizer.model", "not a model", "is not a sentencepiece model; download"),
        ("tekken.json", "", "is a format that is not read here; add the checkpoint's tokenizer.json"),
        ("qwen.tiktoken", "", "has no token for byte 0"),
        ("qwen.tiktoken", "IQ== x", "line 1 is not a token in base64 and its rank"),
        ("tokenizer.model", "IQ== 0\nIg== 2", "its ranks are not 0, 1, 2, ... without gaps"),
        ("tokenizer.model", "IQ== 0\nI= 1", "line 2 is not"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "must map an id"),
    ],
)
def test_unusable_files_are_one_line_saying_what_to_do(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.load(damaged(tmp_path, name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"), [(b"<0x41>", b"<0x4Z>"), (b"<0x41>", b"<0xA>>"), ("你好".encode(), b"\xff" * 6)]
)
def test_a_sentencepiece_model_with_an_odd_piece(tmp_path: Path, old: bytes, new: bytes) -> None:
    """A byte piece that names no byte, or a piece that is not UTF-8."""
    file = train_sentencepiece(tmp_path) / "tokenizer.model"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece model; download") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_an_ambiguous_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give the folder"):
        Tokenizer.load(tmp_path / "nowhere")
    for name in ("a.model.v1", "b.model.v3"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"several tokenizer models \(a\.model\.v1, b\.model\.v3\)"):
        Tokenizer.load(tmp_path)


def test_an_unknown_decoder_is_named(tmp_path: Path) -> None:
    folder = train_byte_level(tmp_path)
    described = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    described.decoder = tokenizers.decoders.WordPiece()
    described.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="decoder=WordPiece is not supported"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"continuing_subword_prefix": "##"}},
    ],
)
def test_a_panic_of_the_library_prints_nothing_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    file = Path(bundled_model()) / "tokenizer.json"
    description = json.loads(file.read_bytes())
    for name, value in change.items():
        merged = value if description[name] is None or name == "normalizer" else {**description[name], **value}
        description[name] = merged
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"tokenizer"):
        Tokenizer.load(tmp_path).encode("How do I start a chat?")
    assert capfd.readouterr().err == ""
