"""``/abort_request``: end what was asked for earlier."""

from __future__ import annotations

from typing import Self

from fastapi import APIRouter
from pydantic import Field, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.server.dependencies import Caller, Model
from jaxdeploy.server.protocol.fields import Strict

router = APIRouter(tags=["operation"])


class AbortRequest(Strict):
    """Which request: its ``id`` as its reply or stream has it; or all of them."""

    request_id: str | None = Field(None, max_length=128)
    abort_all: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.request_id is None) != self.abort_all:
            raise RequestError("request_id or abort_all must be given, and not both; leave one out")
        return self


@router.post("/abort_request")
async def abort_request(asked: AbortRequest, service: Model, caller: Caller) -> dict[str, int]:
    """End a request or all; those who wait for it get an error. How many replies ended is the answer.

    Where keys are separated, it ends only requests that came with the same key.
    """
    return {"aborted": await service.abort(asked.request_id, caller.owner)}
