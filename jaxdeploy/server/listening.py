"""An application at an address, until the process is told to end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError, JaxdeployError
from jaxdeploy.files.stored import is_file
from jaxdeploy.server.http_connection import HttpConnection

DRAIN_SECONDS = 60
"""Seconds that replies have to end, once the process is told to."""
BACKLOG = 2048
"""Connections that wait to be accepted."""


class _Server(uvicorn.Server):
    """Calls ``began`` when it answers, and shuts down when ``ended`` is true."""

    def __init__(self, config: uvicorn.Config, began: Callable[[], None], ended: Callable[[], bool]) -> None:
        super().__init__(config)
        self._began = began
        self._ended = ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        await super().startup(sockets)
        if self.started:
            self._began()

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down; asked ten times a second."""
        return await super().on_tick(counter) or self._ended()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the replies and then the application, also after a second SIGINT."""
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn does not end the application then, and its lifespan fails with a traceback
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()


@contextmanager
def bound(config: ServerConfig) -> Iterator[list[socket.socket]]:
    """Sockets at the address of a server, so that no other server gets it while a model is loaded.

    They do not listen yet, so clients are refused. They are closed at the end.

    Raises ``ConfigError``: the address is in use, forbidden, or not of this machine.
    """
    sockets: list[socket.socket] = []
    try:
        with _address_errors(config):
            host, port = config.server_name or None, config.server_port
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            sockets += [_bound(family, place) for family, _, _, _, place in dict.fromkeys(found)]
        yield sockets
    finally:
        for held in sockets:
            held.close()


def listen(
    app: ASGIApp,
    config: ServerConfig,
    sockets: list[socket.socket],
    *,
    began: Callable[[], None] = lambda: None,
    ended: Callable[[], bool] = lambda: False,
    drain_seconds: int = DRAIN_SECONDS,
) -> None:
    """Answer with ``app`` until SIGINT or SIGTERM; what runs then has ``drain_seconds`` to end.

    Args:
        app: the application.
        config: how it listens.
        sockets: of ``bound``.
        began: called when connections are accepted.
        ended: asked again and again; true shuts the server down.
        drain_seconds: how long replies may take after the signal. A second SIGINT breaks them off.

    Raises:
        ConfigError: a file of the TLS certificate is missing, or another process listens at the address.
        JaxdeployError: the application did not start; the log has the reason.
        KeyboardInterrupt: a second SIGINT came.
    """
    chain, key = certificate(config) or (None, None)
    settings = uvicorn.Config(
        app,
        http=HttpConnection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=drain_seconds,
        ssl_certfile=chain,
        ssl_keyfile=key,
    )
    with _address_errors(config):
        for held in sockets:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its connections may outlive it
            held.listen(BACKLOG)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    server = _Server(settings, began, ended)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
        server.run(sockets)
    if server.force_exit:
        raise KeyboardInterrupt
    if not server.started:
        raise JaxdeployError("the server did not start; its log has the reason")


def _bound(family: int, place: Any) -> socket.socket:
    """A socket at an address. Raises ``OSError``.

    SO_REUSEADDR is needed beside connections that are being closed, but two sockets that have it may be bound to one
    address until one of them listens. So it is the second try.
    """
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            made.bind(place)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(place)
    except BaseException:
        made.close()
        raise
    return made


def _is_news(record: logging.LogRecord) -> bool:
    """Return false for a reply that was broken off on purpose.

    The cause is a second Ctrl-C, the end of the drain time, or a node of a proxy; the proxy has logged the latter.
    """
    if record.msg == "ASGI callable returned without completing response.":
        return False
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextmanager
def _address_errors(config: ServerConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"server_name={config.server_name}, server_port={config.server_port} cannot be used ({reason}); "
            "choose another address, or stop the program that has it"
        ) from None


def address(config: ServerConfig) -> str:
    """Where it listens."""
    return f"{'https' if config.ssl else 'http'}://{config.server_name}:{config.server_port}"


def certificate(config: ServerConfig) -> tuple[str, str] | None:
    """Chain and key; ``None`` without TLS. Raises ``ConfigError`` where a file is missing."""
    if not config.ssl:
        return None
    names = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
    found = []
    for name, value in names.items():
        path = value or os.environ.get(name.upper())
        if path is None or not is_file(Path(path)):
            raise ConfigError(f"{name}={path!r} is no file; name the PEM file, or leave ssl out")
        found.append(path)
    return found[0], found[1]
