"""A client's request as the proxy reads it. A few fields choose the node; the whole body is forwarded."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from jaxdeploy.errors import RequestError
from jaxdeploy.server.errors import ClientGoneError
from jaxdeploy.server.security import KEY_NAME, TENANT

LARGE = 256 * 1024
"""Bytes from which a body is parsed in a thread, so that the event loop is not blocked."""

FORWARDED_HEADERS = frozenset(
    {
        *("accept", "accept-language", "content-encoding", "content-type", "user-agent"),
        *("anthropic-beta", "anthropic-version", "openai-beta", "traceparent", "tracestate"),
    }
)
"""Request headers that a node receives. Keys, cookies and headers about the connection are not among them."""

MAX_QUERY_LENGTH = 2048
MAX_SESSION_LENGTH = 128
"""Characters."""

_QUERY = re.compile(r"[!$-~]*")
"""Printable ASCII without quotes, spaces and the start of a fragment."""

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Asked:
    """A request that may be forwarded.

    ``path`` comes from the list of routes, never from the client. ``fields`` is the body if it is a JSON object, else
    empty. ``model`` is the model that the request names.
    """

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    request_id: str
    fields: dict[str, Any]
    model: str | None

    @classmethod
    async def read(cls, request: Request, path: str) -> Asked:
        """Read ``request``, which matched the route ``path``.

        Raises:
            ClientGoneError: the client disconnected before it had sent the body.
            RequestError: the query string has characters that are not allowed in one.
        """
        query = request.scope["query_string"].decode("latin-1")
        if len(query) > MAX_QUERY_LENGTH or not _QUERY.fullmatch(query):
            raise RequestError(
                f"query={query!r:.80} must be at most {MAX_QUERY_LENGTH} percent-encoded characters; correct it"
            )
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientGoneError("the client left before all was sent") from None
        fields = _fields(body) if len(body) < LARGE else await asyncio.to_thread(_fields, body)
        model = fields.get("adapter_name") or fields.get("model") or request.query_params.get("model")
        return cls(
            method=request.method,
            path=path,
            query=query,
            headers=_headers(request),
            body=body,
            request_id=request.state.request_id,
            fields=fields,
            model=model if isinstance(model, str) else None,
        )

    @property
    def target(self) -> str:
        """Path and query for a node."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def session(self) -> str | None:
        """The id of the conversation that a server stores, or ``None``."""
        session = self.fields.get("session_id")
        if session in (None, -1) or not isinstance(session, int | str):
            return None
        return str(session)[:MAX_SESSION_LENGTH]

    @property
    def digest(self) -> bytes:
        """A digest of method, path, query and body."""
        return hashlib.blake2b(f"{self.method} {self.target}\n".encode() + self.body, digest_size=16).digest()


def _headers(request: Request) -> dict[bytes, bytes]:
    """The headers for a node, with a name of the client's key if the proxy has several keys."""
    headers = {
        name.encode(): value.encode()
        for name, value in request.headers.items()
        if name in FORWARDED_HEADERS and value.isascii() and value.isprintable()
    }
    secret: bytes | None = request.app.state.tenant_secret
    if secret is not None:
        key = str(request.scope[KEY_NAME]).encode()
        headers[TENANT.encode()] = hashlib.blake2b(key, key=secret, digest_size=8).hexdigest().encode()
    return headers


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # the node reports the error
        return {}
    return fields if isinstance(fields, dict) else {}
