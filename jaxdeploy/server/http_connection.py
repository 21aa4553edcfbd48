"""HTTP/1.1 over one connection, with limits: a client that sends or reads too slowly loses it.

A header is at most 16 KiB long (h11's limit). Bodies have limits of their own (``body_limit``).
"""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0
"""Time for the header of a request to arrive."""

READ_SECONDS = 30.0
"""Time in which a client has to read ``READ_BYTES``, or all unread bytes if they are fewer."""
READ_BYTES = 2**16

MAX_CONNECTIONS = 2**13
OTHER_FILES = 128
"""Files and sockets that the server needs in addition to its connections."""


class HttpConnection(H11Protocol):
    """Uvicorn's connection with limits on time. Belongs to one event loop, as all of uvicorn's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._idle_since = time.monotonic()

    @property
    def serving(self) -> bool:
        """Return whether a whole request has come whose response is not complete."""
        return self._in_request and not self.cycle.more_body

    @property
    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection; if there are too many, close the connection that has been idle longest."""
        super().connection_made(transport)
        self._expect_header()
        if len(self.connections) > _most_connections():
            idle = [other for other in self.connections if isinstance(other, HttpConnection) and not other.serving]
            min(idle, key=lambda other: other._idle_since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        _cancel(self._header_timer)
        _cancel(self._read_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        if self._in_request:
            _cancel(self._header_timer)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self._in_request:
            self._expect_header()

    def pause_writing(self) -> None:
        """The client reads more slowly than the response is written."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        _cancel(self._read_timer)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without requests."""
        super().timeout_keep_alive_handler()
        self._abort_later()

    def _expect_header(self) -> None:
        self._idle_since = time.monotonic()
        _cancel(self._header_timer)
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._end)

    def _end(self) -> None:
        self.transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        """Abort a closed connection after ``READ_SECONDS``, which give the client time to read the last bytes."""
        _cancel(self._read_timer)
        self._read_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def _expect_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        _cancel(self._read_timer)
        self._read_timer = self.loop.call_later(READ_SECONDS, self._check_reading, unread)

    def _check_reading(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() > unread - READ_BYTES:
            self.transport.abort()
        else:
            self._expect_reading()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _most_connections() -> int:
    """Return the number of connections for which the process may open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files < 0 else max(1, min(MAX_CONNECTIONS, files - OTHER_FILES))
