"""Reads answers of nodes, up to a limit and by the rules of HTTP."""

from __future__ import annotations

import json
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, NoReturn

import httpx2

from jaxdeploy.server.errors import BadAnswerError, NotTheApiError

MAX_HEADERS = 100
IDENTITY = {b"accept-encoding": b"identity"}
"""Nodes are asked for bodies that are not compressed: a small one could become large."""
_FINAL = frozenset({200, *range(400, 600)})
"""Statuses with which the API answers."""


def client(**settings: Any) -> httpx2.AsyncClient:
    """Return an HTTP client that stores no cookies, follows no redirects and ignores the environment's proxies."""
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    return httpx2.AsyncClient(cookies=no_cookies, follow_redirects=False, trust_env=False, **settings)


def check_head(response: httpx2.Response) -> None:
    """Raise ``NotTheApiError`` for a status, a number of headers or an encoding that the API does not have."""
    if response.status_code not in _FINAL:
        raise NotTheApiError(f"the node answers with status {response.status_code}, which the API does not use")
    if len(response.headers.raw) > MAX_HEADERS:
        raise NotTheApiError(f"the node's answer has more than {MAX_HEADERS} headers")
    encodings = [value for name, value in response.headers.raw if name.lower() == b"content-encoding"]
    if any(value.strip().lower() != b"identity" for value in encodings):
        raise NotTheApiError("the node compresses its answer, though it was asked not to")


async def body_of(response: httpx2.Response, most: int) -> bytes:
    """Return the body of ``response``. Raises ``BadAnswerError`` if it has more than ``most`` bytes."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most:
            raise BadAnswerError(f"the node's answer has more than {most} bytes")
    return bytes(body)


async def fetch(http: httpx2.AsyncClient, request: httpx2.Request, most: int) -> tuple[int, bytes]:
    """Return status and body of the answer to ``request``.

    Raises ``BadAnswerError`` if it breaks a rule or has more than ``most`` bytes, ``httpx2.TransportError``.
    """
    response = await http.send(request, stream=True)
    try:
        check_head(response)
        return response.status_code, await body_of(response, most)
    finally:
        await response.aclose()


def read_json(body: bytes) -> Any:
    """Return ``body`` as JSON. Raises ``ValueError`` for anything that is not, ``NaN`` and ``Infinity`` included."""
    try:
        return json.loads(body, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
