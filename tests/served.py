"""A server in a thread of the test's process, over the bundled model; real sockets, real clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import uvicorn

from jaxdeploy.bundled import bundled_model
from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.chat_template.jinja import JinjaTemplate
from jaxdeploy.config import EngineConfig, ServerConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.server.app import create_app
from jaxdeploy.server.http_connection import HttpConnection
from jaxdeploy.server.service import ModelService

NAME = "demo"
SESSION_LEN = 256
MAX_REPLIES = 12
"""Replies that the server takes at a time."""


TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for message in messages %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function.arguments.city }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def with_tools(template: ChatTemplate) -> ChatTemplate:
    """Return the bundled model's template, changed to show tools and calls."""
    return replace(template, jinja=JinjaTemplate("tools", {"default": TOOL_TEMPLATE}), name="tools")


class RunningApp:
    """Where it listens. ``lifespan`` "on" has it start and end what it runs beside its routes."""

    def __init__(self, app: Any, lifespan: Literal["on", "off"] = "off", port: int = 0) -> None:
        settings = uvicorn.Config(
            app, http=HttpConnection, ws="none", host="127.0.0.1", port=port, log_config=None, lifespan=lifespan
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        assert until(lambda: self._server.started), "the server did not start"
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End it when all is answered."""
        self.tell_to_end()
        self._thread.join()

    def tell_to_end(self) -> None:
        """The same, without waiting for it."""
        self._server.should_exit = True


class RunningServer(RunningApp):
    """A server, and what is behind it; the engine goes on when it is closed."""

    def __init__(self, served: ModelService, config: ServerConfig) -> None:
        self.served = served
        super().__init__(create_app(served, config))

    def idle(self) -> bool:
        """Whether nobody holds a block or a place."""
        stats = asyncio.run(self.served.engine.stats())
        return not (stats.active_blocks or stats.running or stats.waiting or self.served.num_replies)


def demo_config(**settings: Any) -> EngineConfig:
    """Small sizes."""
    return EngineConfig(max_batch_size=8, session_len=SESSION_LEN, block_size=16, warmup=False, **settings)


def demo_engine(**settings: Any) -> AsyncEngine:
    """The bundled model, in this process."""
    config = demo_config(**settings)
    return AsyncEngine(Generator.from_pretrained(bundled_model(), config))


@contextmanager
def running(
    engine: AsyncEngine, most: int = MAX_REPLIES, options: dict[str, Any] | None = None, **config: Any
) -> Iterator[RunningServer]:
    """A server over ``engine``."""
    server = RunningServer(ModelService(engine, NAME, most, **(options or {})), ServerConfig(**config))
    yield server
    server.close()
    server.served.close()


def until(condition: Callable[[], bool], seconds: float = 20, pause: float = 0.01) -> bool:
    """Whether it comes to hold in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(pause)
    return condition()
