"""The client's end of a request: a response that begins late, and may come from one node after another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxdeploy.server.connection import while_connected
from jaxdeploy.server.errors import ClientGoneError
from jaxdeploy.server.proxy.asked import Headers


class Client:
    """What a client is sent. ``started``: status and headers are out, and cannot be taken back."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers, unless they are out."""
        if not self.started:
            self.started = True
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes) -> None:
        """Send a part; waits while the client does not read."""
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """That was all."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A reply in one."""
        await self.start(status, [*headers, ("content-length", str(len(body)))])
        await self.write(body)
        await self.end()


class Relayed(Response):
    """A response that ``work`` writes to the client. It is cancelled when the client leaves."""

    def __init__(self, work: Callable[[Client], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        client = Client(send)

        async def working() -> None:
            await self._work(client)

        try:
            await while_connected(Request(scope, receive), working())
        except ClientGoneError:
            if not client.started:
                raise
