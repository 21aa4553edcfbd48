"""Serve the web chat until the process is told to end."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import gradio as gr
from fastapi import FastAPI
from starlette.requests import HTTPConnection

from jaxdeploy.api.client import is_url
from jaxdeploy.config import ChatTemplateConfig, EngineConfig, ServerConfig
from jaxdeploy.server.body_limit import BodyLimit
from jaxdeploy.server.keys import with_keys
from jaxdeploy.server.listening import address, bound, certificate, listen
from jaxdeploy.server.local import LocalServer
from jaxdeploy.server.logs import set_up_logging
from jaxdeploy.server.run import load
from jaxdeploy.server.security import Keys
from jaxdeploy.web_chat.dialogue import Manner
from jaxdeploy.web_chat.login import LoginGate
from jaxdeploy.web_chat.page import CSS, ON_LOAD, page, theme
from jaxdeploy.web_chat.remote_model import RemoteModel
from jaxdeploy.web_chat.security import PageRules
from jaxdeploy.web_chat.whole_text import WholeText

logger = logging.getLogger("jaxdeploy")

DRAIN_SECONDS = 2
"""Seconds that browsers have to let go, once the process is told to end."""


def web_chat(
    model_or_url: str,
    manner: Manner,
    server_config: ServerConfig,
    *,
    engine_config: EngineConfig | None = None,
    api_key: str | None = None,
    chat_template: ChatTemplateConfig | str | None = None,
    log_level: str = "INFO",
) -> None:
    """Let browsers talk with a model until SIGINT or SIGTERM.

    ``model_or_url`` is the address of a server, which may want ``api_key``, or a model to load: a folder or a hub id.
    ``manner`` is what every new page begins with.

    Raises:
        JaxdeployError: a setting, the checkpoint or the memory does not fit, or there is no server.
    """
    set_up_logging(log_level, server_config.log_format)
    server_config = with_keys(server_config)
    certificate(server_config)
    with bound(server_config) as sockets:
        local = None
        if is_url(model_or_url):
            model = RemoteModel(model_or_url, api_key)
        else:
            service = load(
                model_or_url,
                engine_config or EngineConfig(),
                server_config,
                chat_template=chat_template,
                progress=sys.stderr.isatty(),
            )
            local = LocalServer(service, server_config)
            model = RemoteModel(local.url, local.api_key)
        _show(model, local, manner, server_config, sockets)


def _show(
    model: RemoteModel,
    local: LocalServer | None,
    manner: Manner,
    server_config: ServerConfig,
    sockets: list[socket.socket],
) -> None:
    """Answer browsers until the end. Raises ``EngineDiedError`` where the engine of ``local`` cannot go on."""
    app = create_app(model, manner, server_config, _closing(model, local))
    logging.getLogger("uvicorn.error").addFilter(_is_news)

    def began() -> None:
        logger.info("a chat with %s is at %s", model.name, address(server_config))

    def ended() -> bool:
        return local is not None and not local.healthy

    listen(app, server_config, sockets, began=began, ended=ended, drain_seconds=DRAIN_SECONDS)
    if local is not None:
        local.check()


def create_app(
    model: RemoteModel,
    manner: Manner,
    config: ServerConfig,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The page as an ASGI application. With ``config.api_keys`` users have to bring one of them."""
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    config = with_keys(config)
    keys = Keys(config.api_keys or [])
    if config.api_keys:
        app.add_middleware(LoginGate, logged_in=partial(_logged_in, app))
    app.add_middleware(WholeText)
    app.add_middleware(BodyLimit, most=config.max_body_size)
    app.add_middleware(PageRules)  # the last one added is the first that a request meets
    gr.mount_gradio_app(
        app,
        page(model, manner),
        path="/",
        auth=(lambda name, key: keys.include(key.encode(errors="replace"))) if config.api_keys else None,
        auth_message="Any name, and a key as its password" if config.api_keys else None,
        theme=theme(),
        css=CSS,
        js=ON_LOAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
    )
    return app


def _logged_in(app: FastAPI, connection: HTTPConnection) -> bool:
    """Whether a request brings the cookie of a login; gradio keeps these in its own application below ``app``."""
    pages = [below for route in app.routes if isinstance(below := getattr(route, "app", None), gr.routes.App)]
    names = [(page, f"access-token{kind}-{page.cookie_id}") for page in pages for kind in ("", "-unsecure")]
    return any(connection.cookies.get(name) in page.tokens for page, name in names)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the complaint that streams of open pages had to be ended: they always have."""
    return "timeout graceful shutdown exceeded" not in record.getMessage()


def _closing(model: RemoteModel, local: LocalServer | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await model.close()
        if local is not None:
            local.close()

    return lifespan
