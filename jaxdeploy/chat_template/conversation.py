"""The messages of a conversation: the rules that they obey, and how the prompt made of them ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdeploy.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields that hold the reasoning of an assistant. Templates read the first; gpt-oss's template reads the second."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """The end of a prompt. At most one field is true.

    ``begins``: the prompt ends with the header of a new reply.
    ``continues``: the prompt ends inside the last message, and the reply continues its text.
    """

    begins: bool
    continues: bool


def check_messages(messages: Any, more_roles: Iterable[str] = ()) -> list[Message]:
    """Return copies of ``messages`` without empty tool calls and without null keys other than ``content``.

    Raises:
        RequestError: a message breaks a rule; its place is named. ``more_roles`` are allowed in addition to ``ROLES``.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages={messages!r:.60} must be a list of at least one message; add one")
    roles = tuple(dict.fromkeys((*ROLES, *more_roles)))
    return [_checked(f"messages[{index}]", message, roles) for index, message in enumerate(messages)]


def ending(messages: Sequence[Message], begins: bool | None, continues: bool | None) -> Ending:
    """Return how the prompt ends. A reply that comes last is continued, unless the request says otherwise.

    ``begins`` and ``continues`` are the request's ``add_generation_prompt`` and ``continue_final_message``.

    Raises:
        RequestError: they contradict each other, or there is no reply to continue.
    """
    if begins and continues:
        raise RequestError(
            "add_generation_prompt=true begins a new reply and continue_final_message=true goes on with the last "
            "message; leave one of them out"
        )
    is_reply = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    if continues and not is_reply:
        raise RequestError(
            "continue_final_message=true needs a last message of role='assistant' without tool_calls; add it, or leave "
            "the field out"
        )
    if continues is None:
        continues = is_reply and begins is None
    return Ending(begins=not continues if begins is None else begins, continues=continues)


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message with its parts joined; empty for null.

    Raises:
        RequestError: a part is no text.
    """
    content = message.get("content")
    return content or "" if isinstance(content, str | None) else "".join(part["text"] for part in content)


def _checked(place: str, message: Any, roles: Sequence[str]) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{place}={message!r:.60} must be an object with 'role' and 'content'; write it so")
    if message.get("role") is None:
        raise RequestError(f"{place}.role is missing; give one of {', '.join(roles)}")
    if message["role"] not in roles:
        raise RequestError(f"{place}.role={message['role']!r:.60} is unknown; use one of {', '.join(roles)}")
    kept = {key: value for key, value in message.items() if value is not None}
    kept["content"] = _checked_content(place, message.get("content"))
    if calls := kept.pop("tool_calls", None):
        kept["tool_calls"] = _checked_calls(f"{place}.tool_calls", calls)
    if kept["content"] is None and not (kept["role"] == "assistant" and ("tool_calls" in kept or _thought(kept))):
        raise RequestError(f"{place}.content=null says nothing in a message of role={kept['role']!r}; give it a text")
    return kept


def _checked_content(place: str, content: Any) -> Any:
    """An empty list says as much as null."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{place}.content={content!r:.60} must be text, or a list of parts; send the text alone")
    for index, part in enumerate(content):
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            where = f"{place}.content[{index}]"
            raise RequestError(
                f"{where}: content part type={kind!r} cannot be read by this model; send text parts only"
            )
    return [dict(part) for part in content] or ""


def _checked_calls(place: str, calls: Any) -> list[Message]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{place}={calls!r:.60} must be a list of calls; write it so")
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping) or not isinstance(function_of(call).get("name"), str):
            raise RequestError(
                f"{place}[{index}]={call!r:.60} must have function.name and function.arguments; add them"
            )
    return [dict(call) for call in calls]


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the name and the arguments of a call. Some clients write them without the object around them."""
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _thought(message: Mapping[str, Any]) -> bool:
    return any(message.get(name) for name in THOUGHTS)
