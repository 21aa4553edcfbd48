"""A server in a thread, for this process alone: its own user interface talks with a model as any other client does."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import replace

import uvicorn

from jaxdeploy.config import ServerConfig
from jaxdeploy.server.app import create_app
from jaxdeploy.server.service import ModelService


class LocalServer:
    """Serves ``service`` on this machine's own address, at a free port, to those who have ``api_key``."""

    def __init__(self, service: ModelService, config: ServerConfig) -> None:
        self.api_key = secrets.token_urlsafe()
        self._service = service
        app = create_app(
            service, replace(config, api_keys=[self.api_key], api_keys_file=None, disable_fastapi_docs=True)
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, host="127.0.0.1", port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True, name="local-server")
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    @property
    def healthy(self) -> bool:
        """Whether the engine can still answer."""
        return self._service.engine.failure is None

    def check(self) -> None:
        """Raise what ended the engine, if anything did."""
        self._service.engine.check()

    def close(self) -> None:
        """End it, and the engine with it."""
        self._server.should_exit = True
        self._thread.join()
