"""A node that sends the bytes it is told to, whether they are HTTP or not."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any

Answer = Iterable[bytes] | Callable[[], Iterable[bytes]]
"""Pieces of an answer, or what makes them for each request; they may be endless."""


def whole(body: Any, status: int = 200, kind: str = "application/json", *headers: str) -> list[bytes]:
    """Return an answer with a right length. ``body``: bytes, or a value to send as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = f"Content-Length: {len(content)}"
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", length, "Connection: close", *headers, "", ""]
    return ["\r\n".join(lines).encode("utf-8"), content]


WELL = {"/health": whole({}), "/v1/models": whole({"data": [{"id": "demo"}]})}


class RawNode(socketserver.ThreadingTCPServer):
    """Answers by path; ``answers`` may be changed while it runs. ``asked`` has the head of every other request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, **answers: Answer) -> None:
        self.answers: dict[str, Answer] = {**WELL, "": whole({"text": "well"}), **answers}
        self.asked: list[bytes] = []
        self.sent = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self.shutdown()
        self.server_close()


class _Handler(socketserver.StreamRequestHandler):
    server: RawNode

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        if not head:
            return
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        self.rfile.read(int(lengths[0].split(b":")[1]) if lengths else 0)
        path = head.split(b" ")[1].decode("latin-1")
        if path not in self.server.answers:
            self.server.asked.append(head)
        try:
            answer = self.server.answers.get(path, self.server.answers[""])
            for piece in answer() if callable(answer) else answer:
                self.wfile.write(piece)
                self.server.sent += len(piece)
        except OSError:
            pass  # the proxy has had enough
