"""Selects the parts of a node's answer that reach the client: a few headers, JSON or a stream, bounded errors."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass

import httpx2

from jaxdeploy.server.error_handlers import reply
from jaxdeploy.server.errors import BadAnswerError, NotTheApiError
from jaxdeploy.server.proxy.asked import LARGE, Headers
from jaxdeploy.server.proxy.fetching import body_of, read_json
from jaxdeploy.server.proxy.nodes import clipped

FULL = 429
REFUSALS = frozenset({FULL, 502, 503, 504})
"""Statuses of a node that another node may not give."""
MAX_ERROR_LENGTH = 256 * 1024
"""Bytes of an error that are forwarded."""
JSON = "application/json"
FORMS = frozenset({JSON, "text/event-stream", "application/x-ndjson"})
"""Media types of replies. A browser could run a reply of another type as a page of the proxy."""

FORWARDED_HEADERS = frozenset({"cache-control", "openai-processing-ms", "openai-version", "x-accel-buffering"})
"""Response headers that a client receives in addition to Content-Type and Retry-After."""
MAX_HEADER_LENGTH = 256
_RETRY_AFTER = re.compile(r"\d{1,6}", re.ASCII)


@dataclass(frozen=True)
class Refusal:
    """An error status of a node, with the headers and body that the client gets if no other node answers."""

    status: int
    headers: Headers
    body: bytes

    @property
    def retry_after(self) -> float:
        """Return the seconds after which the node may take the request; infinite if it does not say."""
        return float(dict(self.headers).get("retry-after", "inf"))

    @property
    def rank(self) -> tuple[bool, float]:
        """The lowest is forwarded: first full nodes, by the time until they have room."""
        return self.status != FULL, self.retry_after

    @property
    def may_be_death(self) -> bool:
        """Return whether the request may have killed the node: the answer reports neither a full node nor a time."""
        return self.status != FULL and self.retry_after == float("inf")


def stream_headers(response: httpx2.Response) -> Headers:
    """Return the headers of a reply. Raises ``NotTheApiError`` if its form is none of ``FORMS``."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORMS:
        raise NotTheApiError(f"the node answers with Content-Type {clipped(kind)!r}, which no reply has")
    return [*_kept(response), ("content-type", kind)]


async def error_answer(response: httpx2.Response) -> Refusal:
    """Return an answer with an error status. A message replaces a body that is too large or not JSON."""
    status, headers = response.status_code, [*_kept(response), ("content-type", JSON)]
    try:
        body = await body_of(response, MAX_ERROR_LENGTH)
        if isinstance(read_json(body), dict):
            return Refusal(status, headers, body)
    except (BadAnswerError, ValueError):
        pass
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = reply(f"the node answers {status} and does not say why", kind)
    return Refusal(status, headers, told.model_dump_json().encode())


async def whole_answer(body: bytes) -> bytes:
    """Return ``body``. Raises ``BadAnswerError`` if it is not JSON."""
    try:
        if len(body) > LARGE:
            await asyncio.to_thread(json.loads, body)
        else:
            json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswerError("the node's reply is not JSON; send the request again") from None
    return body


def _kept(response: httpx2.Response) -> Headers:
    headers: Headers = []
    for raw_name, raw_value in response.headers.raw:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        usable = len(value) <= MAX_HEADER_LENGTH and value.isascii() and value.isprintable()
        forwarded = name in FORWARDED_HEADERS or (name == "retry-after" and _RETRY_AFTER.fullmatch(value))
        if forwarded and usable and name not in dict(headers):
            headers.append((name, value))
    return headers
