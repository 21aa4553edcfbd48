"""Replaces halves of surrogate pairs, which JSON can carry and UTF-8 cannot, in requests of browsers."""

from __future__ import annotations

import json
import re

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdeploy.unicode_text import well_formed_values

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class WholeText:
    """Corrects the JSON that browsers send, before the page's library puts it into a stream of events."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        json_body = (b"content-type", b"application/json")
        if scope["type"] != "http" or not any(
            (name, value.partition(b";")[0].strip().lower()) == json_body for name, value in scope["headers"]
        ):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        try:
            whole = _mended(body)
        except (ValueError, RecursionError):
            await PlainTextResponse("the body is not JSON", 400)(scope, receive, send)
            return
        first: Message | None = {"type": "http.request", "body": whole, "more_body": False}

        async def mended() -> Message:
            nonlocal first
            message, first = first, None
            return await receive() if message is None else message

        await self._app(scope, mended, send)


async def _read(receive: Receive) -> bytes | None:
    """Return the whole body; ``None`` if the client left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _mended(body: bytes) -> bytes:
    """Return ``body`` with its surrogates replaced. Raises ``ValueError`` if it is not JSON."""
    if not _SURROGATE.search(body):
        body.decode()
        return body
    return json.dumps(well_formed_values(json.loads(body)), ensure_ascii=False).encode()
