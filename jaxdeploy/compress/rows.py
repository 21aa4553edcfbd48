"""Rows of a data set, a JSON line or a table, as pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdeploy.unicode_text import well_formed

FIELDS = ("text", "messages", "content", "prompt")
"""The fields of a row that may hold its text; the first of them counts."""
DOCUMENT_END = "\n\n"

Message = Mapping[str, Any]


class Piece(NamedTuple):
    """A piece of text.

    ``text`` is the text.
    ``rendered`` is true if a chat template wrote it: names of special tokens in it then mean those tokens.
    ``scored`` is true if perplexity is measured on it.
    """

    text: str
    rendered: bool = False
    scored: bool = True


Render = Callable[[Sequence[Message]], list[Piece] | None]
"""Returns the text of a conversation as the chat template of the model writes it; ``None`` if there is no template."""


def pieces_of(value: Any, render: Render) -> list[Piece] | None:
    """Return the text of ``value``: a string, a list of messages or of texts; ``None`` if it has none.

    Raises ``RequestError`` if the chat template refuses the messages.
    """
    messages = _messages(value)
    if messages and (rendered := render(messages)) is not None:
        return rendered
    text = _text_of(value)
    if text is None:
        return None
    return [Piece(well_formed(text).strip() + DOCUMENT_END)] if text.strip() else []


def _messages(value: Any) -> list[Message]:
    """Return the messages of a conversation with their contents as text; none if ``value`` is anything else."""
    if not isinstance(value, list) or not all(isinstance(item, dict) and "role" in item for item in value):
        return []
    messages: list[Message] = [{**item, "content": _text_of(item.get("content"))} for item in value]
    return messages if any(message["content"] for message in messages) else []


def _text_of(value: Any) -> str | None:
    """Return a string unchanged, or the text of messages and their parts; ``None`` for anything else."""
    if isinstance(value, dict):
        return _text_of(value.get("content", value.get("text")))
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [text for item in value if isinstance(text := _text_of(item), str)]
    return DOCUMENT_END.join(texts) if texts or not value else None
