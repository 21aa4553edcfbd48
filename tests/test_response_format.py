"""The forms that a reply can be asked to have, and which tokens a grammar lets through."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel

from jaxdeploy.bundled import bundled_model
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import RequestError
from jaxdeploy.generation.resolved import resolve
from jaxdeploy.grammar.matcher import FORCED, Grammars, _Vocabulary
from jaxdeploy.grammar.response_format import LARGEST, grammar_of
from jaxdeploy.server.call_grammar import call_grammar
from jaxdeploy.server.parsers import hermes, llama3
from jaxdeploy.tokenizer import Tokenizer

SCHEMAS = Path(__file__).parents[2] / "shared/assets/prompts/jsonschema"
EOS = 4
VOCAB = 1024


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled_model())


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(lambda: tokenizer, VOCAB, frozenset({EOS, 2}))


def accepts(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether every token of ``text``, and the end after them, may come when it comes."""
    matcher = grammars.matcher(grammar)
    for token_id in [*tokenizer.encode(text, add_bos=False, parse_special=False), EOS]:
        words = np.full(VOCAB // 32, 0xFFFFFFFF, np.uint32)
        matcher.allow(words)
        if not words[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1):
            return False
        matcher.take(token_id)
    return True


def form(kind: str, **fields: Any) -> str:
    grammar = grammar_of({"type": kind, **fields})
    assert grammar is not None
    return grammar


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (form("json_object"), ['{"a": [1, null]}', "{}"], ["[]", "{", "5"]),
        (
            form("json_schema", json_schema={"name": "x", "schema": {"type": "array", "items": {"type": "integer"}}}),
            ["[1,2]", "[]"],
            ['["a"]', "[1.5]"],
        ),
        (form("json_schema", json_schema={"type": "boolean"}), ["true"], ["null"]),
        (form("regex_schema", regex_schema="[0-9]{2}-[a-c]+"), ["12-abc"], ["1-a", "12-abcd", "12-"]),
        (form("choice", choice=["yes", 'no "way"']), ["yes", 'no "way"'], ["ye", "yes no"]),
        (form("grammar", grammar='start: "a" b\nb: /[0-9]/ | "(" b ")"'), ["a5", "a((7))"], ["a((7)", "5"]),
        (form("grammar", grammar='root ::= "a" num\nnum ::= [0-9]+'), ["a12"], ["a", "b1"]),
    ],
)
def test_what_follows_a_form(
    grammars: Grammars, tokenizer: Tokenizer, grammar: str, good: list[str], bad: list[str]
) -> None:
    assert all(accepts(grammars, tokenizer, grammar, text) for text in good)
    assert not any(accepts(grammars, tokenizer, grammar, text) for text in bad)


DEEP: Any = {"a": [{"b": [{"c": [1, {}, []]}]}]}


@pytest.mark.parametrize(
    "text",
    [
        *(json.dumps(DEEP, indent=indent) for indent in (None, 0, 2, 4, 8, 16, "\t")),
        json.dumps(DEEP, indent=4).replace("\n", "\r\n"),
        json.dumps(DEEP, indent=4, separators=(", ", ": ")),
        json.dumps(DEEP, separators=(" \t\n\r , ", " \n : \t ")),
        json.dumps(DEEP, indent=2).replace("\n", "\n\n"),
    ],
)
def test_json_may_be_laid_out_in_any_way(grammars: Grammars, tokenizer: Tokenizer, text: str) -> None:
    assert json.loads(text) == DEEP
    assert accepts(grammars, tokenizer, form("json_object"), text)


SMALL = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "asked",
    [
        {"type": "json_object", "schema": SMALL},
        {"type": "json_schema", "schema": SMALL},
        {"type": "json_schema", "json_schema": SMALL},
        {"type": "json_schema", "json_schema": {"name": "x", "description": "", "strict": True, "schema": SMALL}},
        {"type": "json_object", "schema": SMALL, "json_schema": None, "choice": []},
    ],
)
def test_schemas_are_followed_wherever_clients_put_them(
    grammars: Grammars, tokenizer: Tokenizer, asked: dict[str, Any]
) -> None:
    grammar = grammar_of(asked)
    assert grammar is not None
    assert accepts(grammars, tokenizer, grammar, '{"a": 1}')
    assert not accepts(grammars, tokenizer, grammar, '{"a": 3}')


class Leaf(BaseModel):
    size: Literal[1, 2]
    next: Leaf | None = None


class Tree(BaseModel):
    leaf: Leaf


@pytest.mark.parametrize("form_of_calls", [hermes, llama3])
def test_calls_follow_parameters_with_definitions(
    grammars: Grammars, tokenizer: Tokenizer, form_of_calls: ModuleType
) -> None:
    """Each function has ``$defs`` of its own; a schema may refer to itself."""
    loop = {"type": "object", "properties": {"again": {"$ref": "#"}}, "additionalProperties": False}
    functions = {"plant": Tree.model_json_schema(), "cut": Leaf.model_json_schema(), "turn": loop, "stop": None}
    grammar = call_grammar(form_of_calls, functions, tokenizer, several=False)
    name = form_of_calls.ARGUMENTS

    def call(function: str, arguments: str) -> bool:
        said = f'{{"name": "{function}", "{name}": {arguments}}}'
        return accepts(grammars, tokenizer, grammar, f"{form_of_calls.BEGIN}{said}{form_of_calls.END}")

    assert call("plant", '{"leaf": {"size": 1, "next": {"size": 2, "next": null}}}')
    assert call("cut", '{"size": 2}')
    assert call("turn", '{"again": {"again": {}}}')
    assert call("stop", '{"any": [1]}')
    assert not call("plant", '{"leaf": {"size": 3}}')
    assert not call("turn", '{"again": 1}')
    assert not call("cut", '{"leaf": {"size": 1}}')


def test_a_tokenizer_that_begins_texts_with_a_space(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "assets/models/stories260K")
    grammars = Grammars(lambda: tokenizer, 512, frozenset({2}))
    matcher = grammars.matcher(form("choice", choice=["cat", "dog"]))
    text = b""
    while True:
        words = np.full(512 // 32, 0xFFFFFFFF, np.uint32)
        matcher.allow(words)
        allowed = [token_id for token_id in range(512) if words[token_id // 32] >> np.uint32(token_id % 32) & 1]
        if allowed == [2]:
            break
        matcher.take(allowed[-1])
        text += tokenizer.token_bytes(allowed[-1])
    assert text in (b"cat", b"dog")


def test_any_text_needs_no_grammar() -> None:
    assert grammar_of(None) is None
    assert grammar_of({"type": "text"}) is None


@pytest.mark.parametrize(
    ("response_format", "says"),
    [
        ({"type": "xml"}, "response_format.type='xml' is unknown; give text, json_object"),
        ({"strict": True}, "type=None"),
        ({"type": "json_schema"}, "json_schema=None holds no schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"oneOf": [{}, {}]}}}, "oneOf"),
        ({"type": "json_schema", "json_schema": {"schema": {"unevaluatedProperties": False}}}, "unevaluatedProperties"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "strnig"}}}, "cannot be followed"),
        ({"type": "regex_schema", "regex_schema": "[a"}, r"regex_schema='\[a': unclosed character class"),
        ({"type": "regex_schema", "regex_schema": 5}, "regex_schema=5 must be a text"),
        ({"type": "choice", "choice": []}, "choice=.* must be a list of texts"),
        ({"type": "grammar", "grammar": "root ::= ("}, "cannot be read"),
        ({"type": "grammar", "grammar": "start: x"}, "cannot be followed"),
        ({"type": "choice", "choice": ["x" * LARGEST]}, "is larger than"),
        ({"type": "text", "schema": {"type": "object"}}, "response_format.schema is no member of type='text'"),
        ({"type": "json_object", "json_schema": {"type": "array"}}, "response_format.json_schema is no member"),
        ({"type": "choice", "choice": ["a"], "regex": "b"}, "response_format.regex is no member"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strcit": True}},
            "response_format.json_schema.strcit is no member",
        ),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True}}, "json_schema=None holds no schema"),
        (
            {"type": "json_object", "schema": {"properties": {"a": {"pattern": "^(?!x)y$"}}}},
            r"schema.properties.a.pattern='\^\(\?!x\)y\$': look-around, including look-ahead",
        ),
        (
            {"type": "json_object", "schema": {"patternProperties": {"(?=a)": {}}}},
            "schema.patternProperties=.*look-ahead",
        ),
        ({"type": "regex_schema", "regex_schema": r"(a)\1"}, "regex_schema=.*backreferences"),
        ({"type": "json_object", "schema": {"$ref": "#/$defs/a"}}, "Pointer '/\\$defs/a' does not exist"),
    ],
)
def test_what_cannot_be_followed_is_named(response_format: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        grammar_of(response_format)


def test_a_form_says_when_a_reply_ends(tokenizer: Tokenizer) -> None:
    json_object = {"type": "json_object"}
    assert resolve(GenerationConfig(response_format=json_object), {}, tokenizer).sampling.grammar is not None
    with pytest.raises(RequestError, match="leave ignore_eos and min_new_tokens out"):
        resolve(GenerationConfig(response_format=json_object, ignore_eos=True), {}, tokenizer)


def test_forbidden_words_do_not_break_a_form(grammars: Grammars) -> None:
    words = np.zeros(VOCAB // 32, np.uint32)
    grammars.matcher(form("choice", choice=["a"])).allow(words)
    assert words.any()


def test_a_model_without_an_end_follows_nothing(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no token that ends a reply"):
        Grammars(lambda: tokenizer, VOCAB, frozenset()).matcher(form("json_object"))


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="needs ../shared")
def test_real_schemas(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """At least 93 % are followed; their valid instances pass, token by token, and their invalid ones do not."""
    followed = cases = 0
    wrong = []
    for line in (line for file in sorted(SCHEMAS.glob("*.jsonl")) for line in file.read_text().splitlines()):
        case = json.loads(line)
        cases += 1
        try:
            grammar = grammar_of({"type": "json_schema", "json_schema": {"schema": case["schema"]}})
            assert grammar is not None
            grammars.matcher(grammar)
        except RequestError:
            continue
        followed += 1
        for test in case["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            if accepts(grammars, tokenizer, grammar, text) != test["valid"]:
                wrong.append((case["file"], test["valid"], text[:80]))
    assert not wrong
    assert followed >= 0.93 * cases


def test_a_model_with_more_logits_than_its_tokenizer_has_tokens(tokenizer: Tokenizer) -> None:
    """As Qwen2.5 has them; what has no token never comes, nor do drafts that do not follow harm."""
    size = VOCAB + 70
    matcher = Grammars(lambda: tokenizer, size, frozenset({EOS})).matcher(form("choice", choice=["cat cat"]))
    first = tokenizer.encode("cat", add_bos=False)
    words = np.full((3, -(-size // 32)), 0xFFFFFFFF, np.uint32)
    matcher.allow(words, (first[0], size - 1))
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert bits[0, first[0]] == 1
    assert not bits[:2, VOCAB:size].any()
    assert bits[2].all(), "behind a draft that does not follow nothing is said"
    assert matcher.take(first[0])


def test_a_long_text_that_must_come_is_turned_into_tokens_in_parts(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step does not take longer for it, and tokens are those of the tokenizer."""
    text = "How do I start a chat? " * 100
    given: list[int] = []
    encode = tokenizer.encode

    def noted(text: str, **how: Any) -> list[int]:
        given.append(len(text))
        return encode(text, **how)

    monkeypatch.setattr(tokenizer, "encode", noted)
    matcher = grammars.matcher(form("choice", choice=[text]))
    for token_id in encode(text, add_bos=False)[:20]:
        words = np.full(VOCAB // 32, 0xFFFFFFFF, np.uint32)
        matcher.allow(words)
        assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == [token_id]
        assert matcher.take(token_id)
    assert max(given) <= FORCED + 1


def test_a_tokenizer_that_cannot_spell_a_text_gives_its_longest_beginning(tokenizer: Tokenizer) -> None:
    vocabulary = _Vocabulary(tokenizer, VOCAB, [EOS])
    vocabulary.tokens = [token if len(token) == 1 else b"" for token in vocabulary.tokens]
    (token_id,) = vocabulary("chat")
    assert vocabulary.tokens[token_id] == b"c"
