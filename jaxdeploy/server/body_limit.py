"""The size of bodies: bytes, seconds in which they arrive, values and nesting. It is checked before a body is parsed.

Parsing and validating hold up the event loop, and with it all other requests.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdeploy.server.body_text import well_formed_body
from jaxdeploy.server.error_handlers import answer, reply

SECONDS = 120.0
"""Time for a body to arrive."""
MAX_HELD = 32
"""Bodies of the largest size that may be in memory at the same time, and more of smaller ones."""
MAX_VALUES = 2**20
"""Commas between values."""
MAX_OBJECTS = 2**16
SMALL = 2**14
"""Bytes of a body that is checked at once."""
MAX_NUMBER_LENGTH = 20
"""Digits of a length."""
DEEPEST = 200
"""Levels of nested arrays and objects."""

MAX_QUOTES = 4 * (MAX_VALUES + MAX_OBJECTS)
"""Around names and texts."""
TOO_MANY_VALUES = f"the body has more than {MAX_VALUES} values; send it in parts"

_BRACKET = re.compile(rb"[\[{\]}]")


class BodyError(Exception):
    """A body is refused with ``status``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyLimit:
    """Reads whole bodies of at most ``most`` bytes and refuses others."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._held = 0
        self._checker = ThreadPoolExecutor(1, "jaxdeploy-body")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            if not await self._read(Headers(scope=scope), receive, body):
                return
            text = await self._checked(scope, bytes(body))
            await self._app(scope, _replayed(text, receive), send)
        except BodyError as error:
            headers = {"Retry-After": "1"} if error.status == 429 else {"Connection": "close"}
            await answer(reply(str(error), "invalid_request_error"), error.status, headers)(scope, receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, headers: Headers, receive: Receive, body: bytearray) -> bool:
        """Fill ``body``; ``False`` if the client has left. Raises ``BodyError``."""
        told = headers.get("content-length", "0")
        if not told.isdecimal() or len(told) > MAX_NUMBER_LENGTH or int(told) > self._most:
            raise self._too_large()
        try:
            async with asyncio.timeout(SECONDS):
                while (message := await receive())["type"] == "http.request":
                    self._take(message.get("body", b""), body)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            raise BodyError(408, f"the body has not arrived within {SECONDS:g} s; send it faster") from None
        return False

    def _take(self, piece: bytes, body: bytearray) -> None:
        if len(body) + len(piece) > self._most:
            raise self._too_large()
        if self._held + len(piece) > MAX_HELD * self._most:
            raise BodyError(429, "the bodies of all requests together are too large; try again later")
        self._held += len(piece)
        body += piece

    async def _checked(self, scope: Scope, body: bytes) -> bytes:
        """Return ``body`` if it is JSON as well-formed UTF-8. Raises ``BodyError`` for too many values or levels."""
        if "json" not in Headers(scope=scope).get("content-type", "json"):
            return body
        if len(body) <= SMALL:
            text = _checked_json(body)
        else:
            text = await asyncio.get_running_loop().run_in_executor(self._checker, _checked_json, body)
        if len(text) != len(body) and "content-length" in (headers := MutableHeaders(scope=scope)):
            headers["content-length"] = str(len(text))
        return text

    def _too_large(self) -> BodyError:
        return BodyError(413, f"the body is larger than {self._most} bytes; send less")


def _checked_json(body: bytes) -> bytes:
    text = well_formed_body(body)
    objects = text.count(b"{")
    if objects > MAX_OBJECTS or text.count(b",") > MAX_VALUES or objects + text.count(b"[") > DEEPEST:
        _check_structure(_structure(text))
    return text


def _structure(text: bytes) -> bytes:
    """Return JSON without its texts. Every step takes milliseconds, for other threads wait meanwhile."""
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if text.count(b'"') > MAX_QUOTES:
        raise BodyError(413, TOO_MANY_VALUES)
    return b"".join(text.split(b'"')[::2])


def _check_structure(structure: bytes) -> None:
    if structure.count(b",") > MAX_VALUES or structure.count(b"[") > MAX_VALUES:
        raise BodyError(413, TOO_MANY_VALUES)
    if structure.count(b"{") > MAX_OBJECTS:
        raise BodyError(413, f"the body has more than {MAX_OBJECTS} objects; send it in parts")
    depth = 0
    for bracket in _BRACKET.finditer(structure):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > DEEPEST:
            raise BodyError(400, f"the body nests arrays and objects more than {DEEPEST} deep; nest less")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the whole ``body``, then the messages that follow it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
