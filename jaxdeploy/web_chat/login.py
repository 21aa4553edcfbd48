"""Closes the page to visitors without a login and delays repeated wrong logins."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdeploy.server.recent import Recent

LOGIN = frozenset({"/login", "/login/"})
OPEN_PATHS = LOGIN | {"/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
OPEN_FOLDERS = ("/assets/", "/static/")
"""Paths that the login page needs; all others are closed without a login."""
MAX_LOGIN_BYTES = 8192
"""Bytes of a form with a name and a key."""

FREE = 5
"""Wrong logins of an address before it has to wait."""
MAX_WAIT = 60.0
"""Seconds. The wait begins with 1 and doubles with each further wrong login."""
FORGET_SECONDS = 900.0
"""Seconds after which the wrong logins of an address are forgotten."""
MAX_ADDRESSES = 4096
MAX_PER_MINUTE = 300
"""Wrong logins of all addresses together."""


class Attempts:
    """Wrong logins by client address; a network of IPv6 (/64) counts as one address."""

    def __init__(self) -> None:
        self._wrong: Recent[str, tuple[int, float]] = Recent(MAX_ADDRESSES)
        self._minute = (0, 0)
        """A minute, and how many wrong logins there were in it."""

    def wait(self, host: str) -> float:
        """Return the seconds until ``host`` may try again; 0 if it may try now."""
        now = time.monotonic()
        minute, count = self._minute
        if minute == now // 60 and count >= MAX_PER_MINUTE:
            return 60 - now % 60
        wrong, last = self._wrong.get(_address(host)) or (0, 0.0)
        if wrong < FREE:
            return 0.0
        return max(0.0, last + min(MAX_WAIT, 2.0 ** (wrong - FREE)) - now)

    def note(self, host: str) -> None:
        """Record a try of ``host``. It counts as wrong until ``forgive``, so that concurrent tries count too."""
        now = time.monotonic()
        wrong, last = self._wrong.get(_address(host)) or (0, now)
        self._wrong.put(_address(host), (1 if now - last > FORGET_SECONDS else wrong + 1, now))
        minute, count = self._minute
        self._minute = (int(now // 60), count + 1 if minute == now // 60 else 1)

    def forgive(self, host: str) -> None:
        """Record that ``host`` had a right key."""
        self._wrong.forget(_address(host))
        minute, count = self._minute
        self._minute = (minute, max(0, count - 1))


class LoginGate:
    """Answers 401 to requests that are not ``logged_in``, 429 to logins that come too soon after wrong ones."""

    def __init__(self, app: ASGIApp, logged_in: Callable[[HTTPConnection], bool]) -> None:
        self._app = app
        self._logged_in = logged_in
        self._attempts = Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope.get("path", "")
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and path in LOGIN:
            await self._login(scope, receive, send)
        elif path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or self._logged_in(HTTPConnection(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await JSONResponse({"detail": {"error": "Not authenticated"}}, 401)(scope, receive, send)

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = (scope.get("client") or ("", 0))[0]
        if wait := self._attempts.wait(host):
            headers = {"Retry-After": str(math.ceil(wait))}
            refused = JSONResponse({"detail": f"Too many wrong keys; try again in {math.ceil(wait)} s."}, 429, headers)
            await refused(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_LOGIN_BYTES:
            await JSONResponse({"detail": "A name and a key are shorter."}, 413)(scope, receive, send)
            return
        self._attempts.note(host)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._attempts.forgive(host)
            await send(message)

        await self._app(scope, receive, noted)


def _address(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host
