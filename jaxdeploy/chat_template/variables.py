"""Variables that a caller gives to a chat template, as ``chat_template_kwargs`` of a request has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.settings import nearest

THINKING = frozenset({"enable_thinking", "thinking"})
"""Variables that clients set to false for every model. A template that does not read them accepts false."""


def check_variables(given: Mapping[str, Any], read: Collection[str], template: str) -> None:
    """Check that the chat template named ``template``, which reads ``read``, reads every variable of ``given``.

    Null and empty values pass, and so does false for a variable of ``THINKING``.

    Raises:
        RequestError: it does not read some of them; all of them are named.
    """
    unread = [name for name, value in given.items() if name not in read and not _asks_nothing(name, value)]
    if not unread:
        return
    names = ", ".join(f"chat_template_kwargs.{name:.60}" for name in unread[:8])
    near = nearest(unread[0], read) if len(unread) == 1 else ""
    verb = "is" if len(unread) == 1 else "are"
    raise RequestError(f"{names} {verb} not read by chat template {template!r}; {near or 'leave out what it ignores'}")


def _asks_nothing(name: str, value: Any) -> bool:
    return value is None or value in ("", [], {}) or (value is False and name in THINKING)
