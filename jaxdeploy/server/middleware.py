"""What stands around the routes of a server, and of a proxy: the log, the keys, browsers' rules, the size of bodies."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from jaxdeploy.config import ServerConfig
from jaxdeploy.server.body_limit import BodyLimit
from jaxdeploy.server.request_log import RequestLog
from jaxdeploy.server.security import KeyCheck


def surround(app: FastAPI, config: ServerConfig) -> None:
    """Put it around ``app``. The last one added is the first that a request meets."""
    app.add_middleware(BodyLimit, most=config.max_body_size)
    if config.api_keys:
        app.add_middleware(KeyCheck, keys=config.api_keys)
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=config.allow_methods or ["*"],
            allow_headers=config.allow_headers or ["*"],
        )
    app.add_middleware(RequestLog)
