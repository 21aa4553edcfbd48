"""Conversations × real templates, beside transformers; then the rules of messages and of how a prompt ends."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.chat_template.jinja import JinjaTemplate
from jaxdeploy.config import ChatTemplateConfig
from jaxdeploy.errors import CheckpointError, RequestError
from jaxdeploy.tokenizer import Tokenizer
from jaxdeploy.tokenizer.settings import read_settings
from tests.test_chat_template import TOOLS, resolve, with_template
from tests.test_tokenizer import train_byte_level

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Rain?"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "No idea."}
PREFILL = {"role": "assistant", "content": "Well, "}
RESULT = {"role": "tool", "content": "yes", "tool_call_id": "call12345"}
ARGUMENTS = {"city": "Köln", "days": None}
AS_TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
IN_PARTS = [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]


def calls(content: Any, arguments: Any) -> dict[str, Any]:
    call = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


CALLED = [
    [USER, calls(content, arguments), RESULT]
    for content, arguments in (("", ARGUMENTS), (None, ARGUMENTS), (None, AS_TEXT))
]
SAME: dict[str, tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]] = {
    "user": ([USER], []),
    "system": ([SYSTEM, USER, REPLY, USER], []),
    "developer": ([{**SYSTEM, "role": "developer"}, USER], [[SYSTEM, USER]]),
    "empty calls": ([USER, {**REPLY, "tool_calls": []}, USER], [[USER, REPLY, USER]]),
    "null keys": ([USER, {**REPLY, "tool_calls": None, "refusal": None, "name": None}, USER], [[USER, REPLY, USER]]),
    "parts": ([{"role": "user", "content": IN_PARTS}], [[USER]]),
    "parts of system": ([{**SYSTEM, "content": [{"type": "text", "text": "Be brief."}]}, USER], [[SYSTEM, USER]]),
    "thought": ([USER, {**REPLY, "reasoning_content": "Hm"}, USER], []),
    "arguments as object": ([USER, calls("", ARGUMENTS), RESULT], CALLED),
    "arguments as text": ([USER, calls("", AS_TEXT), RESULT], CALLED),
    "null content": ([USER, calls(None, AS_TEXT), RESULT], CALLED),
}
"""Name → messages, and what transformers is given in their place, the first that the template renders as meant."""


def by_transformers(source: str, messages: list[dict[str, Any]], how: str, tools: Any) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ending = {"add_generation_prompt": how == "begins", "continue_final_message": how == "continues"}
    try:
        texts, _ = render_jinja_template(
            [copy.deepcopy(messages)], tools=tools, chat_template=source, **ending, **TOKENS
        )
    except Exception:  # whatever a template makes of the messages
        return None
    return str(texts[0])


def expected(source: str, candidates: list[list[dict[str, Any]]], how: str, tools: Any) -> str | None:
    """Transformers' text of the first candidate that is shown; None if nothing of it is, or if it is refused."""
    for messages in candidates:
        text = by_transformers(source, messages, how, tools)
        called = any("tool_calls" in message for message in messages)
        if text is None or (called and "weather" not in text) or repr(ARGUMENTS) in text:
            continue
        without = [message for message in messages if message["role"] != "tool"]
        hidden = "'tool'" not in source.replace('"', "'") and len(without) < len(messages)
        hidden = hidden and by_transformers(source, without, how, tools) == text
        return None if hidden or (tools and "Forecast" not in text) else text
    return None


def templates(shared: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((shared / "assets/templates").glob("*.jinja")):
        yield path.stem, path.read_text(encoding="utf-8")


def of(source: str, name: str = "mine") -> ChatTemplate:
    return ChatTemplate(name, None, JinjaTemplate(name, {"default": source}), None, (), "chat", TOKENS)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(train_byte_level(tmp_path))


@pytest.mark.parametrize("case", SAME)
def test_conversations_are_rendered_as_in_transformers_or_refused(shared: Path, case: str) -> None:
    messages, candidates = SAME[case]
    rendered = 0
    for name, source in templates(shared):
        template = of(source, name)
        for how, tools in (("begins", None), ("closed", TOOLS), ("continues", None), ("begins", TOOLS)):
            more = [PREFILL] if how == "continues" else []
            wanted = expected(source, [[*chat, *more] for chat in candidates or [messages]], how, tools)
            options = {"add_generation_prompt": False} if how == "closed" else {}
            try:
                got: str | None = template.render([*messages, *more], tools=tools, **options)
            except RequestError:
                got = None
            assert got == wanted, (name, how, bool(tools))
            rendered += got is not None
    assert rendered >= 9, "most templates take most conversations"


PARTS = "{% for part in messages[0].content %}({{ part.text }}){% endfor %}"
CALL = "{% set m = messages[0] %}{% set f = m.tool_calls[0].function %}"


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        ("{{ messages[0].content }}", [{**USER, "content": IN_PARTS}], "Rain?"),
        (PARTS, [USER], "(Rain?)"),
        (PARTS, [{**USER, "content": IN_PARTS}], "(Ra)(in?)"),
        (CALL + "{{ f.name }}{{ m.content is none }}", [calls(None, {})], "weatherTrue"),
        (CALL + "{{ m.content ~ f.name }}", [calls(None, {})], "weather"),
        (CALL + "{{ f.name ~ f.arguments }}", [calls(None, {"a": 1})], 'weather{"a": 1}'),
        (CALL + "{{ f.name }}{{ f.arguments.a }}", [calls(None, '{"a": 1}')], "weather1"),
        (CALL + "{{ f.name }}{{ f.arguments }}", [calls(None, "no JSON")], "weatherno JSON"),
        ("{{ messages[0].role }}{{ 'developer' if 0 }}", [{**SYSTEM, "role": "developer"}], "developer"),
        ("{{ messages[0].thinking }}", [{**REPLY, "reasoning_content": "Hm"}, USER], "Hm"),
    ],
)  # fmt: skip
def test_the_form_that_a_template_needs(source: str, messages: list[dict[str, Any]], text: str) -> None:
    assert of(source).render(messages, add_generation_prompt=False) == text


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], r"messages=\[\] must be a list of at least one message"),
        ("Hi", "messages='Hi' must be a list"),
        (["Hi"], r"messages\[0\]='Hi' must be an object with 'role' and 'content'"),
        ([{"content": "Hi"}], r"messages\[0\].role is missing; give one of system, developer, user"),
        ([USER, {"role": "usr", "content": "Hi"}], r"messages\[1\].role='usr' is unknown; use one of system"),
        ([{"role": "user"}], r"messages\[0\].content=null says nothing in a message of role='user'"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content=null says nothing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content=3 must be text"),
        ([{**USER, "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\]: content part type='image_url'"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]: content part type='str'"),
        ([{**REPLY, "tool_calls": [{"id": "x"}]}], r"messages\[0\].tool_calls\[0\]=.* must have function.name"),
        ([{**REPLY, "tool_calls": "f()"}], r"messages\[0\].tool_calls='f\(\)' must be a list"),
    ],
)  # fmt: skip
def test_messages_obey_the_same_rules_for_every_template(
    tokenizer: Tokenizer,
    messages: Any,
    fault: str,
) -> None:
    for template in (resolve("chatml", tokenizer), of("{{ messages }}")):
        with pytest.raises(RequestError, match=fault):
            template.render(messages)


def test_a_template_may_have_more_roles() -> None:
    source = "{% for m in messages %}{% if m.role == 'critic' %}!{% endif %}{{ m.content }}{% endfor %}"
    assert of(source).render([{"role": "critic", "content": "bad"}]) == "!bad"


@pytest.mark.parametrize(
    ("messages", "tools", "fault"),
    [
        ([USER], TOOLS, "tools have no place in chat template 'mine'"),
        ([SYSTEM, USER], None, "messages of role='system' have no place in chat template 'mine'"),
        ([USER, {**RESULT}], None, "messages of role='tool' have no place"),
        ([USER, calls("x", {}), USER], None, "tool_calls have no place in chat template 'mine'"),
    ],
)
def test_what_a_template_would_drop_is_refused_by_name(messages: Any, tools: Any, fault: str) -> None:
    source = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match=fault):
        of(source).render(messages, tools=tools)


LATER = " if messages | length > 1 }}"
"""What keeps a template from failing when it is loaded."""


@pytest.mark.parametrize(
    ("source", "tools", "fault"),
    [
        ("{% if tools %}{{ tools | length }}{% endif %}", TOOLS, "tools: chat template 'mine' shows none of them"),
        (
            "{% if tools %}{{ tools[0].a.b }}{% endif %}x",
            TOOLS,
            "tools: the chat template fails on them .*no attribute 'a'",
        ),
        (
            "{{ raise_exception('Even\nturns!')" + LATER,
            None,
            r"messages are refused by the chat template \(Even turns!\)",
        ),
        ("{{ messages[1].a.b.c" + LATER, None, r"the chat template failed on the messages \(.*no attribute 'a'\)"),
    ],
)
def test_an_error_says_what_is_at_fault(source: str, tools: Any, fault: str) -> None:
    with pytest.raises(RequestError, match=fault) as caught:
        of(source).render([USER, REPLY, USER], tools=tools)
    assert "\n" not in str(caught.value)


JOINED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRIPPED = JOINED.replace("m.content", "m.content | trim")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "[user]Rain?<end>[assistant]Well, "),
        ({"continue_final_message": True}, "[user]Rain?<end>[assistant]Well, "),
        ({"continue_final_message": True, "add_generation_prompt": False}, "[user]Rain?<end>[assistant]Well, "),
        ({"continue_final_message": False}, "[user]Rain?<end>[assistant]Well, <end>[assistant]"),
        ({"add_generation_prompt": True}, "[user]Rain?<end>[assistant]Well, <end>[assistant]"),
        ({"add_generation_prompt": False}, "[user]Rain?<end>[assistant]Well, <end>"),
    ],
)
def test_a_reply_that_comes_last_is_continued(
    tokenizer: Tokenizer,
    flags: dict[str, Any],
    text: str,
) -> None:
    pieces = ChatTemplateConfig(model_name="mine", user="[user]", eoh="<end>", assistant="[assistant]", eoa="<end>")
    builtin = resolve(pieces, tokenizer)
    for template in (of(JOINED), builtin):
        assert template.render([USER, PREFILL], **flags).removeprefix("[system]<end>") == text
    stripped = of(STRIPPED).render([USER, PREFILL], **flags)
    assert stripped == text.replace("Well, ", "Well,"), "as the template strips texts"


def test_what_can_be_continued() -> None:
    parts = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert of(JOINED).render([USER, parts]).endswith("[assistant]ab")
    thought = {"role": "assistant", "content": "", "reasoning_content": "Hm"}
    thinking = JOINED.replace("{{ m.content }}", "<think>{{ m.reasoning_content }}</think>{{ m.content }}")
    assert of(thinking).render([USER, thought]).endswith("[assistant]<think>Hm")
    with pytest.raises(
        RequestError, match="continue_final_message: the chat template changes or drops the last message"
    ):
        of(JOINED.replace("m.content", "m.content | replace('l', '')")).render([USER, PREFILL])
    with pytest.raises(RequestError, match="continue_final_message=true needs a last message of role='assistant'"):
        of(JOINED).render([USER], continue_final_message=True)
    with pytest.raises(RequestError, match="add_generation_prompt=true begins a new reply and continue_final_message"):
        of(JOINED).render([USER, PREFILL], continue_final_message=True, add_generation_prompt=True)


def test_named_templates_are_chosen_as_in_transformers(tmp_path: Path) -> None:
    def templates_of(config: Any, **files: str) -> dict[str, str]:
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}), encoding="utf-8")
        for name, text in files.items():
            path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (tmp_path / path).write_text(text, encoding="utf-8")
        return dict(read_settings(tmp_path).chat_templates)

    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools[0].function.name }}"}]
    both = JinjaTemplate("checkpoint", templates_of(named))
    template = ChatTemplate("checkpoint", None, both, None, (), "chat", {})
    assert template.render([USER]) == template.render([USER], tools=[]) == "D"
    assert template.render([USER], tools=TOOLS) == "Tweather"
    assert templates_of({"default": "D", "rag": "R"}) == {"default": "D", "rag": "R"}
    assert templates_of("one") == {"default": "one"}
    assert templates_of("one", rag="R") == {"rag": "R"}, "files come before the configuration"
    assert templates_of("one", default="F", tool_use="T") == {"default": "F", "rag": "R", "tool_use": "T"}
    only = ChatTemplate("checkpoint", None, JinjaTemplate("checkpoint", {"rag": "R"}), None, (), "chat", {})
    with pytest.raises(RequestError, match=r"chat templates \(rag\) have none named 'default'"):
        only.render([USER])


@pytest.mark.parametrize("given", [5, [5], [{"name": "default"}], [{"name": ["x"], "template": "y"}], {"default": 5}])
def test_templates_that_are_no_texts(tmp_path: Path, given: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"chat_template=.* must be a text, or a list of objects"):
        read_settings(tmp_path)


def test_a_named_template_can_be_asked_for(tmp_path: Path) -> None:
    made = with_template(tmp_path, "D")
    made.chat_templates = {"default": "D", "rag": "R"}
    assert resolve("rag", made).render([USER]) == "R"
    assert resolve(None, made).render([USER]) == "D"


LMDEPLOY_DEFAULTS = (
    *("internlm", "internlm2", "llama2", "vicuna", "wizardlm"),
    *("ultralm", "ultracm", "deepseek-coder", "dbrx"),
)


@pytest.mark.parametrize("name", LMDEPLOY_DEFAULTS)
def test_default_system_prompts_of_lmdeploy(tokenizer: Tokenizer, name: str) -> None:
    usual = resolve(name, tokenizer)
    assert usual.meta_instruction is not None
    assert usual.meta_instruction in usual.render([USER])
    assert usual.meta_instruction not in usual.render([SYSTEM, USER])
    off = resolve(ChatTemplateConfig(model_name=name, meta_instruction=""), tokenizer)
    assert off.render([USER]) == off.render([USER]).lstrip()
    assert off.render([USER]).startswith((off.pieces.user if off.pieces else "") + "Rain?")
