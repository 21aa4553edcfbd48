"""A proxy in this process and the nodes that it forwards to; real sockets."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import httpx2

from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.server.proxy.app import create_proxy_app
from tests.fake_node import WORDS, FakeNode
from tests.served import RunningApp, until

ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Count."}]}
STREAM = {**ASK, "stream": True}
CHAT = "/v1/chat/completions"
QUICK = {"heartbeat_interval": 0.05, "heartbeat_timeout": 10.0}
ALL = "".join(WORDS)


class Running:
    """A proxy and its nodes."""

    def __init__(
        self, stack: ExitStack, names: str = "ab", server: dict[str, Any] | None = None, **config: Any
    ) -> None:
        self.started: list[FakeNode] = []
        self.nodes = [self.node(name) for name in names]
        urls = [node.url for node in self.nodes]
        made = ProxyConfig(**{**QUICK, "nodes": urls, **config})
        self.app = RunningApp(create_proxy_app(made, ServerConfig(**(server or {}))), lifespan="on")
        stack.callback(self._close)
        self.url = self.app.url
        self.http = stack.enter_context(httpx2.Client(base_url=self.url, timeout=20))

    def node(self, name: str, **behaviour: Any) -> FakeNode:
        made = FakeNode(name, **behaviour)
        self.started.append(made)
        return made

    def _close(self) -> None:
        for app in (self.app, *self.started):
            app.tell_to_end()
        for app in (self.app, *self.started):
            app.close()

    def status(self, node: FakeNode) -> dict[str, Any]:
        found: dict[str, Any] = self.statuses()[node.url]
        return found

    def statuses(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/nodes/status").json()
        return found

    def idle(self) -> bool:
        return not any(node["in_flight"] for node in self.statuses().values())

    def asked_of(self, count: int = 1) -> list[FakeNode]:
        """Return the nodes that were asked, after at least ``count`` answers."""
        assert until(lambda: sum(node.answered for node in self.nodes) >= count)
        return [node for node in self.nodes if node.answered]

    def other(self, node: FakeNode) -> FakeNode:
        (other,) = [each for each in self.nodes if each is not node]
        return other

    def metric(self, line: str) -> float:
        found = re.search(rf"^jaxdeploy_proxy:{re.escape(line)} (.*)$", self.http.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0
