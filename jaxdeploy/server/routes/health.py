"""``/health`` for those who restart servers, ``/metrics`` for those who watch them."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from jaxdeploy.engine.async_engine import EngineStoppedError
from jaxdeploy.server.dependencies import Model
from jaxdeploy.server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operation"])

PATIENCE = 10.0
"""Seconds in which an engine that is alive says how it stands, whatever it computes meanwhile."""


class Health(BaseModel):
    """The server is well."""

    status: Literal["healthy"] = "healthy"


@router.get("/health")
async def health(served: Model) -> Health:
    """Whether replies can be expected. Answered without an API key."""
    try:
        await asyncio.wait_for(served.engine.stats(), PATIENCE)
    except TimeoutError:
        raise EngineStoppedError(f"the engine has not answered for {PATIENCE:g} s; restart it") from None
    return Health()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(served: Model) -> PlainTextResponse:
    """Prometheus' text format."""
    served.metrics.take(await served.engine.stats())
    return PlainTextResponse(served.metrics.text(), media_type=CONTENT_TYPE)
