"""``/health`` for those who restart servers, ``/metrics`` for those who watch them."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from jaxdeploy.engine.front.async_engine import EngineStoppedError
from jaxdeploy.server.dependencies import Model
from jaxdeploy.server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operation"])

PATIENCE = 10.0
"""Seconds in which an engine that is alive says how it stands, whatever it computes meanwhile."""
STUCK = 60.0
"""Seconds that no step takes, not even one that has to be compiled first."""


class Health(BaseModel):
    """The server is well."""

    status: Literal["healthy"] = "healthy"


@router.get("/health")
async def health(service: Model) -> Health:
    """Whether replies can be expected. Answered without an API key."""
    try:
        stats = await asyncio.wait_for(service.engine.stats(), PATIENCE)
    except TimeoutError:
        raise EngineStoppedError(f"the engine has not answered for {PATIENCE:g} s; restart it") from None
    stalled = service.watchdog.stalled_for(stats)
    if stats.fault:
        raise EngineStoppedError(f"the engine is being restarted: {stats.fault}; try again later")
    if stalled > STUCK:
        raise EngineStoppedError(f"the engine has work and has not run a step for {stalled:.0f} s; restart it")
    return Health()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Model) -> PlainTextResponse:
    """Prometheus' text format."""
    service.metrics.take(await service.engine.stats())
    return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE)
