"""A checkpoint's Jinja templates, given messages in the form that they were written for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from jaxdeploy.chat_template.conversation import THOUGHTS, Ending, Message, function_of, text_of
from jaxdeploy.chat_template.sandbox import CompiledTemplate, TemplateError
from jaxdeploy.chat_template.shapes import Shape, called, is_shown, shapes, shows
from jaxdeploy.errors import RequestError
from jaxdeploy.tokenizer.settings import DEFAULT

GOES_ON = "<|the reply goes on here|> "
"""Follows the last message while it is rendered. The space shows whether the template strips texts."""
TOOL_USE = "tool_use"

Variables = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]


class JinjaTemplate:
    """One template or several by name, of which transformers' rule chooses: ``tool_use`` for tools, else ``default``.

    ``source`` is all of their text.

    Raises:
        CheckpointError: a source is no valid Jinja, or exceeds the limits.
    """

    def __init__(self, name: str, sources: Mapping[str, str]) -> None:
        self.name = name
        self.source = "\n".join(sources.values())
        self.roles = frozenset(re.findall(r"""['"](\w+)['"]""", self.source))
        """Words that the templates may compare roles with."""
        self._templates = {label: CompiledTemplate(source) for label, source in sources.items()}

    def reads(self, tools: Tools | None) -> frozenset[str]:
        """Return the variables that the template for ``tools`` reads. Raises ``RequestError`` without a template."""
        return self._chosen(tools).reads

    def render(self, messages: Sequence[Message], tools: Tools | None, how: Ending, variables: Variables) -> str:
        """Return the text of checked ``messages``.

        Raises:
            RequestError: the template refuses them or fails, or it shows none of the tools, of the calls, or of the
                messages of a role.
        """
        template = self._chosen(tools)
        if tools and "tools" not in template.variables:
            raise RequestError(f"tools have no place in chat template {self.name!r}; leave tools out")
        chat = [self._as_read(message) for message in messages]
        said, chat = _marked(chat) if how.continues else ("", chat)
        given = {**variables, "tools": tools or None, "add_generation_prompt": how.begins}
        shaped, text = self._rendered(template, chat, given)
        self._check_shown(template, shaped, given, text)
        return _cut(text, said) if how.continues else text

    def _chosen(self, tools: Tools | None) -> CompiledTemplate:
        name = TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT
        if name not in self._templates:
            known = ", ".join(self._templates)
            raise RequestError(
                f"the model's chat templates ({known}) have none named 'default'; choose one at its start"
            )
        return self._templates[name]

    def _as_read(self, message: Message) -> Message:
        """Return a message with names that templates read.

        ``developer`` is the newer name of ``system``. A thought has several names, as transformers gives it.
        """
        if message["role"] == "developer" and "developer" not in self.source:
            message = {**message, "role": "system"}
        if message.keys().isdisjoint(THOUGHTS):
            return message
        thought = next(message[name] for name in THOUGHTS if name in message)
        return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}

    def _rendered(self, template: CompiledTemplate, chat: list[Message], given: Variables) -> tuple[list[Message], str]:
        """Return the first rendering that shows everything, else the first that does not fail, and its messages."""
        fault: TemplateError | None = None
        found: tuple[list[Message], str] | None = None
        for shape in shapes(chat):
            shaped = shape.of(chat)
            try:
                text = template.render({**given, "messages": shaped})
            except TemplateError as error:
                fault = fault or error
                continue
            if shows(text, chat, shaped) and not (
                shape.null is None and _writes_null(template, shape, chat, given, text)
            ):
                return shaped, text
            found = found or (shaped, text)
        if found is not None:
            return found
        assert fault is not None, "there is at least one form"
        if given["tools"] and _renders(template, {**given, "tools": None, "messages": chat}):
            raise RequestError(f"tools: the chat template fails on them ({fault.reason}); change tools") from fault
        raise fault

    def _check_shown(self, template: CompiledTemplate, chat: list[Message], given: Variables, text: str) -> None:
        """Raise ``RequestError`` for tools that the text does not show, and for roles and calls that no text shows.

        A template may leave out a message of a role that it knows: Mistral's show the system prompt in some turns only.
        """
        names = [str(function_of(tool).get("name")) for tool in given["tools"] or ()]
        if names and not any(is_shown(name, text) for name in names):
            raise RequestError(f"tools: chat template {self.name!r} shows none of them; leave tools out")
        present = set(map(itemgetter("role"), chat))
        for role in ({"system", "developer", "tool"} - self.roles) & present:
            hidden = any(message["role"] == role and not is_shown(text_of(message), text) for message in chat)
            others = [message for message in chat if message["role"] != role]
            if hidden and _renders(template, {**given, "messages": others}) == text:
                raise RequestError(
                    f"messages of role={role!r} have no place in chat template {self.name!r}; leave them out"
                )
        calls = called(chat)
        if "tool_calls" in self.source or not calls or all(is_shown(name, text) for name in calls):
            return
        silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in chat]
        if _renders(template, {**given, "messages": silent}) == text:
            raise RequestError(f"tool_calls have no place in chat template {self.name!r}; leave them out")


def _writes_null(template: CompiledTemplate, shape: Shape, chat: list[Message], given: Variables, text: str) -> bool:
    """Return whether null content is printed as ``None``."""
    if "None" not in text or not any(message.get("content", "") is None for message in chat):
        return False
    empty = _renders(template, {**given, "messages": Shape("", shape.parts, shape.objects).of(chat)})
    return empty is not None and empty.count("None") < text.count("None")


def _renders(template: CompiledTemplate, given: Variables) -> str | None:
    try:
        return template.render(given)
    except TemplateError:
        return None


def _marked(chat: list[Message]) -> tuple[str, list[Message]]:
    """Return the text to continue, or else the thought, and the messages with ``GOES_ON`` after it."""
    *before, last = chat
    content = last["content"]
    if isinstance(content, list):
        *first, part = content
        marked = [*first, {**part, "text": part["text"] + GOES_ON}]
        return part["text"], [*before, {**last, "content": marked}]
    if content or not last.get("reasoning_content"):
        return content or "", [*before, {**last, "content": (content or "") + GOES_ON}]
    thought = last["reasoning_content"]
    marks = {name: thought + GOES_ON for name in THOUGHTS if last.get(name) == thought}
    return thought, [*before, {**last, **marks}]


def _cut(text: str, said: str) -> str:
    """Return the text up to ``GOES_ON``, like transformers' ``continue_final_message``."""
    before, found, after = text.rpartition(GOES_ON.rstrip())
    if not found or said.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template changes or drops the last message, so that it cannot be "
            "continued; leave the message out, or set continue_final_message=false"
        )
    return before if after.startswith(" ") else before.rstrip()
