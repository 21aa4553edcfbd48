"""An application at an address, until the process is told to end."""

from __future__ import annotations

import os
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError

DRAIN_SECONDS = 60
"""Seconds that replies have to end, once the process is told to."""


def listen(app: ASGIApp, config: ServerConfig, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Answer with ``app`` until SIGINT or SIGTERM; what runs then has ``drain_seconds`` to end.

    Raises ``ConfigError``.
    """
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
        if path is None or not Path(path).is_file():
            raise ConfigError(f"{name}={path!r} is no file; name the PEM file, or leave ssl out")
        found.append(path)
    return found[0], found[1]
