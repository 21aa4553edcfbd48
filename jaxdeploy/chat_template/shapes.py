"""The forms in which the same messages can be given to a Jinja template. Templates are written for different ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from jaxdeploy.chat_template.conversation import Message, function_of, text_of

ABSENT = object()


@dataclass(frozen=True)
class Shape:
    """One form of the messages.

    ``null`` replaces the content of a message without text: null content, or an empty text next to calls.
    ``parts``: whether text is in parts; ``None`` leaves the content as the client wrote it.
    ``objects``: whether arguments of calls are objects.
    """

    null: Any = None
    parts: bool | None = None
    objects: bool = True

    def of(self, messages: Sequence[Message]) -> list[Message]:
        """Return copies of ``messages`` in this form."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        content = message.get("content")
        if _is_null(message):
            content = self.null
        elif self.parts is not None:
            content = self._content(content)
        shaped = {**message, "content": content}
        if shaped["content"] is ABSENT:
            del shaped["content"]
        if "tool_calls" in message:
            shaped["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return shaped

    def _content(self, content: Any) -> Any:
        if self.parts == isinstance(content, list):
            return content
        return [{"type": "text", "text": content}] if self.parts else text_of({"content": content})

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(function_of(call))
        if function.get("arguments") is not None:
            function["arguments"] = (
                _as_object(function["arguments"]) if self.objects else as_text(function["arguments"])
            )
        return {**call, "function": function} if "function" in call else function


def shapes(messages: Sequence[Message]) -> Iterator[Shape]:
    """Return the distinct forms of ``messages`` in the order in which a template gets them.

    First null stays null, content stays as it was written, and arguments are objects, as transformers documents them.
    """
    has_nulls = has_none = has_lists = has_calls = False
    for message in messages:
        content = message.get("content")
        has_none = has_none or content is None
        has_nulls = has_nulls or _is_null(message)
        has_lists = has_lists or isinstance(content, list)
        has_calls = has_calls or "tool_calls" in message
    nulls: tuple[Any, ...] = (None,)
    if has_nulls:
        nulls = (None, ABSENT, "") if has_none else ("", None, ABSENT)
    parts = (None, False) if has_lists else (None, True)
    objects = (True, False) if has_calls else (True,)
    for part, null, object_ in product(parts, nulls, objects):
        yield Shape(null, part, object_)


def shows(text: str, messages: Sequence[Message], shaped: Sequence[Message]) -> bool:
    """Return whether ``text`` shows ``messages``, given as ``shaped``, and no Python values in their place.

    A template that expects text prints the ``repr`` of an object, and one that expects parts skips a text.
    """
    said: Message | None = None
    for message, form in zip(messages, shaped, strict=True):
        if isinstance(form.get("content"), list) and repr(form["content"]) in text:
            return False
        if "tool_calls" in message and not _shows_calls(text, message, form):
            return False
        if message["role"] == "user":
            said = message
    return said is None or is_shown(text_of(said), text)


def _shows_calls(text: str, message: Message, form: Message) -> bool:
    if any(arguments and not isinstance(arguments, str) and repr(arguments) in text for arguments in _arguments(form)):
        return False
    return all(is_shown(name, text) for name in called([message]))


def called(messages: Sequence[Message]) -> list[str]:
    """Return the names of all functions that were called."""
    return [function_of(call)["name"] for message in messages for call in message.get("tool_calls", ())]


def is_shown(said: str, text: str) -> bool:
    """Return whether ``text`` contains ``said``, unchanged or inside JSON."""
    said = said.strip()
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def as_text(arguments: Any) -> str:
    """Return the arguments of a call as JSON."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _is_null(message: Message) -> bool:
    return message.get("content") is None or (message["content"] == "" and "tool_calls" in message)


def _as_object(arguments: Any) -> Any:
    """Return the JSON object in ``arguments``, or ``arguments`` unchanged if there is none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _arguments(message: Message) -> Iterator[Any]:
    for call in message.get("tool_calls", ()):
        yield function_of(call).get("arguments")
