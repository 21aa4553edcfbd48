"""Clients that send or read slowly, or say nothing: they lose their connections, and others are served."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from jaxdeploy.server import http_connection
from jaxdeploy.server.logs import TextFormat
from jaxdeploy.server.request_log import RequestLog
from tests.served import RunningApp, until

PIECE = b"x" * 2**16


class Flood:
    """A response without end. ``ended`` counts those that have ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    async def answer(self, request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            self.begun += 1
            try:
                while True:
                    yield PIECE
                    await asyncio.sleep(0)
            finally:
                self.ended += 1

        return StreamingResponse(pieces())


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


@pytest.fixture
def flood() -> Flood:
    return Flood()


@pytest.fixture
def app(flood: Flood) -> Iterator[RunningApp]:
    made = RunningApp(Starlette(routes=[Route("/flood", flood.answer), Route("/{path:path}", hello)]))
    yield made
    made.close()


def connected(app: RunningApp, said: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", app.port), timeout=20)
    made.sendall(said)
    return made


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends it, within the socket's timeout."""
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_a_client_that_does_not_read_loses_its_place(
    app: RunningApp, flood: Flood, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "READ_SECONDS", 0.2)
    with closing(connected(app, b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")):
        assert until(lambda: flood.begun == 1)
        assert until(lambda: flood.ended == 1)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHos", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"])
def test_a_header_must_arrive_in_time(app: RunningApp, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADER_SECONDS", 0.2)
    with closing(connected(app, said)) as connection:
        connection.settimeout(3)  # less than the keep-alive timeout
        assert is_closed(connection)


def test_a_header_is_limited(app: RunningApp) -> None:
    with closing(connected(app, b"GET / HTTP/1.1\r\n")) as connection:
        with suppress(ConnectionError):
            connection.sendall(b"x" * 2**24)
        assert is_closed(connection)
    assert httpx2.get(app.url).text == "hello"


def test_idle_connections_make_room_for_new_ones(app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "MAX_CONNECTIONS", 3)
    idle = [connected(app) for _ in range(3)]
    assert httpx2.get(app.url).text == "hello"
    idle[0].settimeout(3)
    assert is_closed(idle[0]), "the one that is idle longest goes first"
    for connection in idle:
        connection.close()


def test_nobody_can_forge_a_line_of_the_log() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(TextFormat())
    logger = logging.getLogger("jaxdeploy.server")
    logger.addHandler(handler)
    app = RunningApp(RequestLog(Starlette(routes=[Route("/{path:path}", hello)])))
    try:
        logger.setLevel(logging.INFO)
        httpx2.get(f"{app.url}/x%0A2026-01-01%20INFO%20forged%1b[0m%E2%80%A8z")
        try:
            raise ValueError("a\n2026-01-01 INFO forged")
        except ValueError:
            logger.exception("failed")
    finally:
        app.close()
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    first, *rest = written.getvalue().splitlines()
    assert r"GET /x\n2026-01-01 INFO forged\x1b[0m\u2028z" in first
    assert not [line for line in rest if line.startswith("2026-01-01")]
