"""The application: routes, and what stands around them. ``create_app`` needs a loaded model and no network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from jaxdeploy.config import ServerConfig
from jaxdeploy.server import error_handlers
from jaxdeploy.server.request_log import RequestLog
from jaxdeploy.server.routes import routers
from jaxdeploy.server.security import BodyLimit, KeyCheck
from jaxdeploy.server.served import Served


def create_app(served: Served, config: ServerConfig) -> FastAPI:
    """The server as an ASGI application; the engine is closed at its end."""
    hidden = ("docs_url", "redoc_url", "openapi_url") if config.disable_fastapi_docs else ()
    app = FastAPI(
        title="jaxdeploy",
        version=version("jaxdeploy"),
        summary=f"Replies of {served.name}",
        lifespan=_closing(served),
        **dict.fromkeys(hidden),  # type: ignore[arg-type]
    )
    app.state.served = served
    error_handlers.install(app)
    for router in routers():
        app.include_router(router, responses=error_handlers.RESPONSES)
    # The last one added is the first that a request meets.
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
    return app


def _closing(served: Served) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        served.engine.close()

    return lifespan
