"""A proxy and two servers that register with it, each in a separate process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2

from tests.integration.test_server_process import launched
from tests.served import until

RUNNING = 4
"""Replies that a server generates concurrently."""
SMALL = ("--max-batch-size", str(RUNNING), "--session-len", "512", "--no-warmup")
PATIENCE = 10
"""Seconds that a node may be silent: the machine may be busy."""
KEYS = ("--proxy-api-key", "of-operator", "--api-keys", "of-node")


class Cluster:
    """A proxy, and servers that register with it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        flags = ("--api-keys", "of-proxy", "--operator-keys", "of-operator", "--heartbeat-timeout", str(PATIENCE))
        self.proxy, self.url = stack.enter_context(launched(folder / "proxy", "proxy", *flags))
        self.headers = {"Authorization": "Bearer of-proxy"}
        operator = {"Authorization": "Bearer of-operator"}
        self._http = stack.enter_context(httpx2.Client(base_url=self.url, headers=operator, timeout=30))
        self.servers: dict[str, subprocess.Popen[bytes]] = {}

    def complete(self, warm_up: Callable[[], Any] = lambda: None) -> tuple[str, str]:
        """The addresses of two servers that are up. ``warm_up`` is called when one of them is new."""
        new = 2 - len(self.servers)
        while len(self.servers) < 2:
            flags = (*SMALL, *KEYS, "--proxy-url", self.url)
            log = self._folder / str(len(list(self._folder.iterdir())))
            running, url = self._stack.enter_context(launched(log, "api_server", *flags))
            self.servers[url] = running
        assert self.comes_to(set(self.servers)), self.status()
        if new:
            warm_up()
        one, other = self.servers
        return one, other

    def comes_to(self, urls: set[str]) -> bool:
        """Whether just these are up, soon."""
        return until(lambda: {url for url, node in self.status().items() if node["up"]} == urls, 240, pause=0.5)

    def moved(self, url: str) -> float:
        """Requests that were sent to a server and, when it failed, to another one."""
        wanted = f'jaxdeploy_proxy:retries_total{{node="{url}",reason="failed"}} '
        lines = self._http.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))

    def status(self) -> dict[str, Any]:
        """The proxy's nodes."""
        try:
            found: dict[str, Any] = self._http.get("/nodes/status").json()
        except httpx2.TransportError:
            return {}
        return found
