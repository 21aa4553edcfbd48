"""Calls and thoughts out of texts, however the text is split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.errors import ConfigError
from jaxdeploy.server.parsers import TOOL_PARSERS, hermes, internlm2, llama3, mistral, reasoning_form, think, tool_form
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Parser, Text, Thought

CASES = Path(__file__).parents[2] / "shared/assets/prompts/bfcl"

Calls = list[tuple[str, Any]]
WEATHER: Calls = [
    ("weather", {"city": 'a "b" {c}]\\', "days": [1, {"x": None}]}),
    ("no.thing", {}),
    ("x", {"y": "</z>;"}),
]


def _objects(calls: Calls, arguments: str, begin: str, between: str, end: str) -> str:
    texts = [json.dumps({"name": name, arguments: values}) for name, values in calls]
    return begin + between.join(texts) + end if calls else ""


def in_hermes(calls: Calls) -> str:
    return _objects(calls, "arguments", hermes.BEGIN, hermes.BETWEEN, hermes.END)


def in_internlm2(calls: Calls) -> str:
    return _objects(calls, "parameters", internlm2.BEGIN, internlm2.BETWEEN, internlm2.END)


def in_llama3(calls: Calls) -> str:
    return _objects(calls, "parameters", "<|python_tag|>", llama3.BETWEEN, "")


def in_bare_llama3(calls: Calls) -> str:
    return _objects(calls, "parameters", llama3.BEGIN, llama3.BETWEEN, llama3.END)


def in_mistral(calls: Calls) -> str:
    return _objects(calls, "arguments", mistral.BEGIN, mistral.BETWEEN, mistral.END)


def in_late_mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(values)}" for name, values in calls)


FORMS: list[tuple[Callable[[], Parser], Callable[[Calls], str]]] = [
    (hermes.parser, in_hermes),
    (internlm2.parser, in_internlm2),
    (llama3.parser, in_llama3),
    (llama3.parser, in_bare_llama3),
    (mistral.parser, in_mistral),
    (mistral.parser, in_late_mistral),
]


def parse(parser: Parser, pieces: Iterable[str]) -> tuple[str, Calls, str]:
    """Text, calls and thoughts."""
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    return said(events), called(events), "".join(event.text for event in events if isinstance(event, Thought))


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def called(events: list[Event]) -> Calls:
    names = [event for event in events if isinstance(event, CallBegins)]
    assert [event.index for event in names] == list(range(len(names)))
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.piece
    return [(event.name, json.loads(text)) for event, text in zip(names, arguments, strict=True)]


def pieces_of(text: str, cuts: Iterable[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@pytest.mark.parametrize(("parser", "written"), FORMS)
def test_calls_at_every_split(parser: Callable[[], Parser], written: Callable[[Calls], str]) -> None:
    text = written(WEATHER)
    expected = ("", WEATHER, "")
    assert parse(parser(), [text]) == expected
    assert parse(parser(), text) == expected, "character by character"
    for cut in range(len(text)):
        assert parse(parser(), [text[:cut], text[cut:]]) == expected, cut


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.text("abc._-", min_size=1, max_size=6), st.dictionaries(st.text(max_size=4), JSON, max_size=3)),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(("parser", "written"), FORMS)
@settings(max_examples=50, deadline=None)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_any_calls(
    parser: Callable[[], Parser], written: Callable[[Calls], str], calls: Calls, cuts: list[int]
) -> None:
    assert parse(parser(), pieces_of(written(calls), cuts)) == ("", calls, "")


@pytest.mark.parametrize(
    ("parser", "text", "left"),
    [
        (hermes.parser, "Let me see.\n<tool_call>\n{}\n</tool_call>\nSo.", "Let me see.\n<tool_call>{}\n\nSo."),
        (hermes.parser, "<tool_call> soon", "<tool_call>soon"),
        (hermes.parser, "if a < b: ", "if a < b: "),
        (hermes.parser, '<tool_call>{"name": 5', '<tool_call>{"name": 5'),
        (llama3.parser, "Hello {you}", "Hello {you}"),
        (llama3.parser, '{"answer": 42} is JSON', '{"answer": 42} is JSON'),
        (llama3.parser, "<|python_tag|>print(5)", "print(5)"),
        (llama3.parser, '{"answer":', '{"answer":'),
        (mistral.parser, "Hello [TOOL", "Hello [TOOL"),
        (mistral.parser, "Hello", "Hello"),
    ],
)
def test_what_is_no_call_is_text(parser: Callable[[], Parser], text: str, left: str) -> None:
    assert parse(parser(), [text]) == (left, [], "")
    assert parse(parser(), text) == (left, [], "")


def test_text_around_calls() -> None:
    text = f"I look it up. \n\n{in_hermes(WEATHER)}\n Done. \n"
    assert parse(hermes.parser(), text) == ("I look it up.Done. \n", WEATHER, "")


def test_other_ways_to_write_arguments() -> None:
    def of(arguments: str) -> Calls:
        return parse(hermes.parser(), f'<tool_call>{{{arguments}"name": "f"}}</tool_call>')[1]

    assert of('"arguments" : {"a": 1} , ') == [("f", {"a": 1})], "before the name"
    assert of('"arguments": "{\\"a\\": 1}", ') == [("f", {"a": 1})], "a JSON text within a text"
    assert of('"arguments": null, ') == of("") == [("f", {})]


def test_arguments_come_as_they_are_written() -> None:
    parser = hermes.parser()
    parser.push('<tool_call>{"name": "f", "arguments": ')
    assert parser.push('{"a": [1,') == [CallArguments(0, '{"a": [1,')]
    assert parser.push(" 2]") == [CallArguments(0, " 2]")]


@pytest.mark.parametrize(
    ("thinking", "text", "thought", "left"),
    [
        (False, "<think>\nHm.\n\nYes. \n</think>\n\n42 ", "Hm.\n\nYes.", "42 "),
        (True, "\nHm. </think> 42", "Hm.", "42"),
        (False, " 42 <think>", "", " 42 <think>"),
        (False, "<thin", "", "<thin"),
        (True, "so many thoughts </thi", "so many thoughts </thi", ""),
        (False, "<think>\n\n</think>\n\n42", "", "42"),
    ],
)
def test_thoughts(thinking: bool, text: str, thought: str, left: str) -> None:
    for cut in range(len(text)):
        assert parse(think.parser(thinking=thinking), [text[:cut], text[cut:]]) == (left, [], thought), cut
    assert parse(think.parser(thinking=thinking), text) == (left, [], thought)


def test_forms_are_found_by_name_and_in_templates() -> None:
    assert {tool_form(name, None) for name in TOOL_PARSERS} == {hermes, llama3, internlm2, mistral}
    assert tool_form(None, "... <tool_call> ...") is hermes
    assert tool_form(None, "{{ messages }}") is None
    assert reasoning_form(None, "x.split('</think>')") is think
    assert reasoning_form("deepseek-r1", None) is think
    with pytest.raises(ConfigError, match="tool_call_parser='pascal' is unknown; choose one of hermes"):
        tool_form("pascal", None)


def _expected_calls(name: str) -> list[Calls]:
    """The first accepted answer of every case of the Berkeley function-calling leaderboard."""
    answers = (CASES / "possible_answer" / name).read_text().splitlines()
    return [
        [(function, {key: values[0] for key, values in arguments.items()}) for call in json.loads(line)["ground_truth"]
         for function, arguments in call.items()]
        for line in answers
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["BFCL_v4_simple_python.json", "BFCL_v4_parallel.json"])
@pytest.mark.parametrize(("parser", "written"), FORMS)
def test_real_calls(parser: Callable[[], Parser], written: Callable[[Calls], str], name: str) -> None:
    for calls in _expected_calls(name):
        text = written(calls)
        assert parse(parser(), text) == ("", calls, "")
        for cut in range(len(text)):
            assert parse(parser(), [text[:cut], text[cut:]]) == ("", calls, "")
