"""What routes ask for: the served model, a name for the reply, and to be stopped when the client goes."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import Depends, Request

from jaxdeploy.server.connection import while_connected
from jaxdeploy.server.errors import ForbiddenError
from jaxdeploy.server.served import Served

__all__ = ["Model", "ReplyId", "need_keys", "while_connected"]


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served


def need_keys(request: Request) -> None:
    """Raise ``ForbiddenError`` where requests need no key: this is not for everybody who reaches the server."""
    if not request.app.state.needs_keys:
        raise ForbiddenError(
            "adapters are loaded while serving only where requests need a key; start the server with --api-keys KEY, "
            "or give it --adapters NAME=PATH"
        )


def _reply_id() -> str:
    return uuid.uuid4().hex


Model = Annotated[Served, Depends(_served)]
ReplyId = Annotated[str, Depends(_reply_id)]
"""A new name: the id that a client may send for the log can come twice."""
