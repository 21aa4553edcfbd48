"""Load a model and serve it until the process is told to end."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from jaxdeploy.config import ChatTemplateConfig, EngineConfig, ServerConfig
from jaxdeploy.engine.async_engine import AsyncEngine
from jaxdeploy.errors import ConfigError
from jaxdeploy.server.app import create_app
from jaxdeploy.server.logs import set_up_logging
from jaxdeploy.server.served import Served

logger = logging.getLogger("jaxdeploy")

DRAIN_SECONDS = 60
"""Seconds that replies have to end, once the process is told to."""


def serve(
    model: str,
    engine_config: EngineConfig | None = None,
    server_config: ServerConfig | None = None,
    *,
    chat_template: ChatTemplateConfig | str | None = None,
    log_level: str = "INFO",
    progress: bool = False,
) -> None:
    """Serve ``model``, a folder or a hub id, until SIGINT or SIGTERM; replies that run then are finished first.

    Raises:
        JaxdeployError: a setting, the checkpoint or the memory does not fit; the message says what to do.
    """
    engine_config, config = engine_config or EngineConfig(), server_config or ServerConfig()
    set_up_logging(log_level, config.log_format)
    certificate(config)
    served = load(model, engine_config, config, chat_template=chat_template, progress=progress)
    app = create_app(served, config)
    logger.info("%s is served at %s", served.name, address(config))
    listen(app, config, DRAIN_SECONDS)


def load(
    model: str,
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    chat_template: ChatTemplateConfig | str | None = None,
    progress: bool = False,
) -> Served:
    """``model`` with an engine in a process of its own, as routes want it. Raises ``JaxdeployError``."""
    return Served(
        AsyncEngine.from_pretrained(model, engine_config, chat_template=chat_template, progress=progress),
        engine_config.model_name or model,
        config.max_concurrent_requests,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )


def listen(app: ASGIApp, config: ServerConfig, drain_seconds: int) -> None:
    """Answer with ``app`` until SIGINT or SIGTERM; what runs then has ``drain_seconds`` to end."""
    chain, key = certificate(config) or (None, None)
    uvicorn.run(
        app,
        host=config.server_name,
        port=config.server_port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=drain_seconds,
        ssl_certfile=chain,
        ssl_keyfile=key,
    )


def address(config: ServerConfig) -> str:
    """Where a server listens, as a URL."""
    return f"{'https' if config.ssl else 'http'}://{config.server_name}:{config.server_port}"


def certificate(config: ServerConfig) -> tuple[str, str] | None:
    """Chain and key; ``None`` without TLS. Raises ``ConfigError`` where a file is missing."""
    if not config.ssl:
        return None
    names = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
    found = []
    for name, value in names.items():
        path = value or os.environ.get(name.upper())
        if path is None or not Path(path).is_file():
            raise ConfigError(f"{name}={path!r} is no file; name the PEM file, or leave ssl out")
        found.append(path)
    return found[0], found[1]
