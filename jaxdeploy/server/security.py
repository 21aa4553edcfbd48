"""What every request has to pass before a route sees it: its key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxdeploy.server.error_handlers import answer, reply

OPEN_PATHS = frozenset({"/health", "/docs"})
"""Answered without a key."""


KEY_NAME = "jaxdeploy.key"
"""Where the scope of a request has a name of the key that it came with."""
TENANT = "x-jaxdeploy-tenant"
"""The header in which a proxy names the key of its client. It only divides what its sender may see anyway."""


class Keys:
    """Keys, of which only digests are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        assert all(keys), "an empty key would let everybody in"
        self._digests = [_digest(key.encode()) for key in keys]

    def include(self, key: bytes) -> bool:
        """Whether ``key`` is one of them. It is compared with every one in whole: the time taken tells nothing."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class KeyCheck:
    """Lets requests through that bring one of ``keys``, as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = Keys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        key = key_of(Headers(scope=scope))
        if self._keys.include(key):
            await self._app({**scope, KEY_NAME: _digest(key).hex()[:16]}, receive, send)
            return
        body = reply("the API key is missing or wrong; send Authorization: Bearer KEY", "authentication_error")
        body.error.code = "invalid_api_key"
        await answer(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


def key_of(headers: Headers) -> bytes:
    """The key that a request brings; empty if it brings none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return given.encode("latin-1")  # as ASGI servers read headers


def _digest(key: bytes) -> bytes:
    """Of one length, whatever the key's: else the comparison would tell that."""
    return hashlib.sha256(key).digest()
