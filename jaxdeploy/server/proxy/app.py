"""The proxy as an application."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from importlib.metadata import version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.server import error_handlers
from jaxdeploy.server.documentation import add_documentation
from jaxdeploy.server.keys import with_keys
from jaxdeploy.server.middleware import surround
from jaxdeploy.server.proxy import operators, routes
from jaxdeploy.server.proxy.operators import Operators
from jaxdeploy.server.proxy.proxy import Proxy


def create_proxy_app(config: ProxyConfig, server_config: ServerConfig) -> FastAPI:
    """A proxy as an ASGI application. No key of a client, and none of another node, is sent to a node.

    Raises:
        RequestError: one of ``nodes`` is no address.
        ConfigError: keys are missing where they should be, or empty.
        TooManyNodesError: there are more ``nodes`` than a proxy takes.
    """
    server_config = with_keys(server_config)
    proxy = Proxy(config)
    app = FastAPI(
        title="jaxdeploy proxy",
        version=version("jaxdeploy"),
        summary="Several servers at one address",
        lifespan=_running(proxy),
        redirect_slashes=False,  # a path with a slash too many is not a path of the proxy
        docs_url=None,  # FastAPI's own pages load scripts from another host
        redoc_url=None,
        openapi_url=None if server_config.disable_fastapi_docs else "/openapi.json",
    )
    app.state.proxy = proxy
    app.state.needs_keys = bool(server_config.api_keys)
    app.state.tenant_secret = secrets.token_bytes() if len(server_config.api_keys or ()) > 1 else None
    app.state.operators = Operators.of(config, server_config)
    error_handlers.install(app)
    for part in (operators.router, operators.abort, routes.router):
        app.include_router(part, responses=error_handlers.RESPONSES)
    if not server_config.disable_fastapi_docs:
        add_documentation(app)
    app.router.routes.append(Route("/{path:path}", _NotHere(), name="not_here"))
    surround(app, _with_operators(config, server_config))
    return app


def _with_operators(config: ProxyConfig, server_config: ServerConfig) -> ServerConfig:
    """``server_config`` with operators' keys among the clients', if clients need any."""
    if not server_config.api_keys:
        return server_config
    return replace(server_config, api_keys=[*server_config.api_keys, *(config.operator_keys or ())])


class _NotHere:
    """Answers every other path, with any method."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        raise HTTPException(404, "no route of the proxy, and not forwarded to its nodes")


def _running(proxy: Proxy) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with proxy.running():
            yield

    return lifespan
