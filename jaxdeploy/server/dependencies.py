"""What routes ask for: the served model, a name for the reply, and to be stopped when the client goes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from jaxdeploy.errors import JaxdeployError
from jaxdeploy.server.served import Served

T = TypeVar("T")


class ClientGoneError(JaxdeployError):
    """Nobody waits for the answer any more."""

    http_status = 499


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served


def _reply_id() -> str:
    return uuid.uuid4().hex


Model = Annotated[Served, Depends(_served)]
ReplyId = Annotated[str, Depends(_reply_id)]
"""A new name: the id that a client may send for the log can come twice."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves. Raises ``ClientGoneError`` then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError("the client left before the answer was there")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
