"""A server of OpenAI's API without a model: it says what it is told to, waits, fails and dies as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.served import RunningApp

WORDS = ("one", " two", " three")
JSON = {"type": "application/json"}


@dataclass
class Behaviour:
    """What a node does; may be changed while it runs."""

    name: str
    models: tuple[str, ...] = ("demo",)
    words: tuple[str, ...] = WORDS
    waits_before: int | None = None
    """The word that it does not come to, counted from 0."""
    pause: float = 0.0
    """Seconds between words."""
    pings: int = 0
    """Pings that come before the first word."""
    full_for: int | None = None
    """Answer 429, with so many seconds as Retry-After."""
    ill: bool = False
    hangs: bool = False
    key: str | None = None
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Path, fields and headers of what was asked of its model."""
    targets: list[str] = field(default_factory=list)
    """Method and path of the same, as they were sent."""
    left: int = 0
    """Clients that left."""
    written: int = 0
    """Bytes of endless replies."""


class FakeNode(RunningApp):
    """A node that runs in a thread."""

    def __init__(self, name: str, port: int = 0, **behaviour: Any) -> None:
        self.does = Behaviour(name, **behaviour)
        super().__init__(self._app(), port=port)

    @property
    def answered(self) -> int:
        """How often its model was asked."""
        return len(self.does.asked)

    def kill(self) -> None:
        """Break all connections and listen no more, as the death of a process does."""
        loop = self._server.servers[0].get_loop()
        loop.call_soon_threadsafe(self._die)
        self.close()

    def listen_no_more(self) -> None:
        """Take no new connections, as a server that was told to end; replies go on."""
        self._server.servers[0].get_loop().call_soon_threadsafe(self._server.servers[0].close)

    def tell_to_end(self) -> None:
        """At once, whatever is asked."""
        self._server.force_exit = True
        super().tell_to_end()

    def _die(self) -> None:
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            transport: Any = connection.transport
            transport.abort()

    def _app(self) -> Starlette:
        paths = {"/health": self._health, "/v1/models": self._models}
        routes = [Route(path, answer, methods=["GET"]) for path, answer in paths.items()]
        return Starlette(routes=[*routes, Route("/{path:path}", self._asked, methods=["GET", "POST", "DELETE"])])

    async def _health(self, request: Request) -> Response:
        await self._hang()
        return JSONResponse({"error": {"message": "the engine is gone"}}, 503 if self.does.ill else 200)

    async def _models(self, request: Request) -> Response:
        await self._hang()
        if self.does.key and request.headers.get("authorization") != f"Bearer {self.does.key}":
            return JSONResponse({"error": {"message": "no"}}, 401)
        return JSONResponse(
            {"data": [{"id": name, "object": "model", "owner": self.does.name} for name in self.does.models]}
        )

    async def _asked(self, request: Request) -> Response:
        body = await request.body()
        fields = json.loads(body) if body else {}
        self.does.asked.append((request.url.path, fields, dict(request.headers)))
        self.does.targets.append(f"{request.method} {request.scope['raw_path'].decode('latin-1')}")
        await self._hang()
        if self.does.full_for is not None:
            told = {"error": {"message": f"{self.does.name} is full", "type": "rate_limit"}}
            return JSONResponse(told, 429, {"Retry-After": str(self.does.full_for)})
        if request.url.path == "/abort_request":
            return JSONResponse({"aborted": 2})
        if fields.get("endless"):
            return StreamingResponse(self._endless(), media_type="text/event-stream")
        if request.url.path == "/v1/messages":
            return StreamingResponse(self._messages(), media_type="text/event-stream")
        if request.url.path == "/v1/chat/interactive":
            return StreamingResponse(self._lines(), media_type="application/x-ndjson")
        if fields.get("stream"):
            return StreamingResponse(self._chat(), media_type="text/event-stream")
        return StreamingResponse(
            self._whole(), media_type="application/json", headers={"Connection": "x-secret", "X-Secret": "1"}
        )

    async def _said(self) -> AsyncIterator[str]:
        for at, word in enumerate(self.does.words):
            try:
                await asyncio.sleep(self.does.pause)
                while self.does.waits_before is not None and at >= self.does.waits_before:
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.does.left += 1
                raise
            yield word

    async def _chat(self) -> AsyncIterator[str]:
        yield chunk({"role": "assistant", "content": ""})
        for _ in range(self.does.pings):
            yield ": ping\n\n"
        async for word in self._said():
            yield chunk({"content": word})
        yield chunk({}, "stop") + "data: [DONE]\n\n"

    async def _messages(self) -> AsyncIterator[str]:
        yield named("message_start", message={"id": self.does.name})
        yield named("ping")
        async for word in self._said():
            yield named("content_block_delta", delta={"type": "text_delta", "text": word})
        yield named("message_stop")

    async def _lines(self) -> AsyncIterator[str]:
        async for word in self._said():
            yield json.dumps({"text": word}) + "\n"

    async def _whole(self) -> AsyncIterator[str]:
        yield '{"text": "'
        async for word in self._said():
            yield word
        yield '"}'

    async def _endless(self) -> AsyncIterator[str]:
        piece = chunk({"content": "x" * 65536})
        while True:
            self.does.written += len(piece)
            yield piece
            await asyncio.sleep(0)

    async def _hang(self) -> None:
        while self.does.hangs:
            await asyncio.sleep(0.01)


def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


def named(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"
