"""The application: routes, and what stands around them. ``create_app`` needs a loaded model and no network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from jaxdeploy.config import ServerConfig
from jaxdeploy.server import error_handlers
from jaxdeploy.server.documentation import add_documentation
from jaxdeploy.server.keys import with_keys
from jaxdeploy.server.middleware import surround
from jaxdeploy.server.registering import registered
from jaxdeploy.server.routes import routers
from jaxdeploy.server.service import ModelService


def create_app(service: ModelService, config: ServerConfig) -> FastAPI:
    """The server as an ASGI application; the engine is closed at its end. Raises ``ConfigError`` for wrong keys."""
    config = with_keys(config)
    app = FastAPI(
        title="jaxdeploy",
        version=version("jaxdeploy"),
        summary=f"Replies of {service.name}",
        lifespan=_lifespan(service, config),
        docs_url=None,  # FastAPI's own pages load scripts from another host
        redoc_url=None,
        openapi_url=None if config.disable_fastapi_docs else "/openapi.json",
    )
    app.state.service = service
    app.state.needs_keys = bool(config.api_keys)
    app.state.separates_tenants = config.separate_keys
    app.state.separates_keys = config.separate_keys and len(config.api_keys or ()) > 1
    error_handlers.install(app)
    for router in routers():
        app.include_router(router, responses=error_handlers.RESPONSES)
    if not config.disable_fastapi_docs:
        add_documentation(app)
    surround(app, config)
    return app


def _lifespan(service: ModelService, config: ServerConfig) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with registered(config):
                yield
        finally:
            service.close()
            service.engine.close()

    return lifespan
