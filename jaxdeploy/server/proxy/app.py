"""The proxy as an application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.server import error_handlers
from jaxdeploy.server.keys import with_keys
from jaxdeploy.server.middleware import surround
from jaxdeploy.server.proxy.proxy import Proxy
from jaxdeploy.server.proxy.routes import router


def create_proxy_app(config: ProxyConfig, server_config: ServerConfig) -> FastAPI:
    """A proxy as an ASGI application. Keys of its own stay with it: nodes are shown ``node_api_key`` or none.

    Raises:
        RequestError: one of ``nodes`` is no address.
        ConfigError: keys are missing where they should be, or empty.
    """
    server_config = with_keys(server_config)
    proxy = Proxy(config, keep_keys=not (server_config.api_keys or config.node_api_key))
    hidden = ("docs_url", "redoc_url", "openapi_url") if server_config.disable_fastapi_docs else ()
    app = FastAPI(
        title="jaxdeploy proxy",
        version=version("jaxdeploy"),
        summary="Several servers at one address",
        lifespan=_running(proxy),
        **dict.fromkeys(hidden),  # type: ignore[arg-type]
    )
    app.state.proxy = proxy
    error_handlers.install(app)
    app.include_router(router, responses=error_handlers.RESPONSES)
    surround(app, server_config)
    return app


def _running(proxy: Proxy) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with proxy.running():
            yield

    return lifespan
