"""A request as the proxy sees it: where it goes depends on few of its fields, and all of it is passed on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from jaxdeploy.server.errors import ClientGoneError

LARGE = 256 * 1024
"""Bytes of a body that is parsed in a thread, so that others are not kept waiting."""

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)
"""Headers about one connection (RFC 9110, section 7.6.1)."""
OF_REQUESTS = frozenset({"host", "content-length", "accept-encoding", "expect", "x-request-id"})
OF_REPLIES = frozenset({"content-length", "date", "server", "x-request-id"})
"""Headers that the proxy's own client and server write."""
KEYS = frozenset({"authorization", "x-api-key"})

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Asked:
    """``target`` is path and query as they were sent, ``fields`` the body's where it is a JSON object."""

    method: str
    target: str
    headers: Headers
    body: bytes
    request_id: str
    fields: dict[str, Any]
    model: str | None

    @classmethod
    async def read(cls, request: Request) -> Asked:
        """All of ``request``. Raises ``ClientGoneError``."""
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientGoneError("the client left before all was sent") from None
        fields = _fields(body) if len(body) < LARGE else await asyncio.to_thread(_fields, body)
        model = fields.get("adapter_name") or fields.get("model") or request.query_params.get("model")
        query = request.scope["query_string"].decode("latin-1")
        return cls(
            method=request.method,
            target=request.scope["raw_path"].decode("latin-1") + (f"?{query}" if query else ""),
            headers=end_to_end(request.headers.items(), OF_REQUESTS),
            body=body,
            request_id=request.state.request_id,
            fields=fields,
            model=model if isinstance(model, str) else None,
        )

    @property
    def session(self) -> str | None:
        """The conversation that a server remembers, if the request belongs to one."""
        session = self.fields.get("session_id")
        return None if session in (None, -1) else str(session)


def end_to_end(headers: Iterable[tuple[str, str]], but: frozenset[str]) -> Headers:
    """The headers that are passed on: none that belong to one connection, nor those of ``but``."""
    given = [(name.lower(), value) for name, value in headers]
    named = {option.strip().lower() for name, value in given if name == "connection" for option in value.split(",")}
    return [(name, value) for name, value in given if name not in HOP_BY_HOP | but | named]


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # the node says what is wrong with it
        return {}
    return fields if isinstance(fields, dict) else {}
