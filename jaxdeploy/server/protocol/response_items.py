"""Items of ``/v1/responses``: what was said earlier, and the messages of a chat that they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from jaxdeploy.server.protocol.chat import MOST_MESSAGES
from jaxdeploy.server.protocol.fields import Arguments, Strict, echoed, refused

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class TextPart(Strict):
    """Text that was said by either side."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Any = echoed("notes on the text")
    logprobs: Any = echoed("log-probabilities of the text")
    parsed: Any = echoed("text, as OpenAI's client parsed it")
    prompt_cache_breakpoint: Any = Field(None, description="of no need: prompts that begin alike always share")


class RefusalPart(Strict):
    """What the model said in place of a reply."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The same as text."""
        return self.refusal


class ReasoningPart(Strict):
    """A thought, or what it comes to."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _kind(item: Any) -> str | None:
    """The tag of an item, which is no identifier, for it has no place in the path to a field that is wrong."""
    if not isinstance(item, dict):
        return None
    return f"type={item.get('type') or 'message'}"


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class MessageItem(Strict):
    """Something that was said."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: ItemStatus | None = None
    phase: Any = refused("leave it out")


class CallItem(Strict):
    """A call that the model made in an earlier reply."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    parsed_arguments: Any = echoed("arguments, as OpenAI's client parsed them")
    id: str | None = None
    status: ItemStatus | None = None
    namespace: Any = refused("leave it out")
    caller: Any = refused("the model calls by itself", {"type": "direct"})


class CallOutputItem(Strict):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: ItemStatus | None = None
    name: str | None = None
    namespace: Any = refused("leave it out")
    caller: Any = refused("the model calls by itself", {"type": "direct"})


class ReasoningItem(Strict):
    """What the model said to itself in an earlier reply."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningPart] = Field([])
    content: list[ReasoningPart] | None = None
    status: ItemStatus | None = None
    encrypted_content: Any = refused("this server cannot read it; send content")


Item = Annotated[
    Annotated[MessageItem, Tag("type=message")]
    | Annotated[CallItem, Tag("type=function_call")]
    | Annotated[CallOutputItem, Tag("type=function_call_output")]
    | Annotated[ReasoningItem, Tag("type=reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="It is no message, function_call, function_call_output or reasoning; leave it out",
    ),
]
Items = Annotated[
    list[Item],
    Field(min_length=1, max_length=MOST_MESSAGES),
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Return the messages of a chat. The thoughts, text and calls of one reply are one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                _reply(messages, "content", "tool_calls")["content"] = _text(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
            case ReasoningItem():
                reply = _reply(messages, "content", "tool_calls")
                reply["reasoning_content"] = reply.get("reasoning_content", "") + _text(item.content or item.summary)
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _reply(messages).setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                name = {"name": item.name} if item.name else {}
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output), **name})
    for message in messages:
        if "tool_calls" not in message:
            message.setdefault("content", "")
    return messages


def _reply(messages: list[dict[str, Any]], *ending: str) -> dict[str, Any]:
    """The model's message at the end, which has none of the fields ``ending``; a new one if there is none."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in ending):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(parts: Iterable[TextPart | RefusalPart | ReasoningPart]) -> str:
    return "".join(part.text for part in parts)
