"""Request bodies as UTF-8 text: lone surrogates become U+FFFD before a route reads the JSON."""

from __future__ import annotations

import json
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ESCAPES = re.compile(
    rb"\\u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair: one character
    rb"|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\."  # any other escape, among them the escaped backslash of \\ud83d
)


class Utf8Bodies:
    r"""Makes every body well-formed UTF-8, so that no field of a request can hold half a character.

    JSON can name half of a surrogate pair (``\ud83d``), and ``json.loads`` accepts it. Such a string has no UTF-8
    form: tokenizers, grammars and replies would fail on it later.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. The body arrives as a whole; messages after it pass unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        complete = False

        async def well_formed() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            message = await _whole(receive)
            complete = True
            if message["type"] == "http.request":
                message["body"] = well_formed_body(message["body"])
            return message

        await self._app(scope, well_formed, send)


def well_formed_body(body: bytes) -> bytes:
    """Return a JSON text in UTF-8 whose strings are all well-formed; ``body`` is in any encoding of JSON."""
    encoding = json.detect_encoding(body)
    if encoding != "utf-8" or not _is_utf8(body):
        body = body.decode(encoding, "replace").encode()
    if b"\\ud" in body or b"\\uD" in body:
        return ESCAPES.sub(lambda found: rb"\ufffd" if found["lone"] else found[0], body)
    return body


async def _whole(receive: Receive) -> Message:
    """The body as one message, or the disconnect that came before its end."""
    pieces, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return message
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return {"type": "http.request", "body": b"".join(pieces), "more_body": False}


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True
