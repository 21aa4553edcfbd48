"""Dependencies of routes: the model, the name of the reply, and an end when the client disconnects."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from jaxdeploy.server.connection import while_connected
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.errors import ForbiddenError
from jaxdeploy.server.security import KEY_NAME, TENANT
from jaxdeploy.server.service import ModelService
from jaxdeploy.server.sessions import SessionKey

__all__ = ["Caller", "Model", "ReplyId", "need_keys", "while_connected"]


@dataclass(frozen=True)
class Tenant:
    """Who sent a request: ``owner`` is a name of its key where keys are separated, else empty."""

    owner: str = ""

    def context(
        self,
        request_id: str,
        *,
        user: str = "",
        priority: int = 0,
        session_id: int | None = None,
        adapter: str | None = None,
    ) -> RequestContext:
        """Return the context of a request. Raises ``ForbiddenError`` for a priority before other keys' requests.

        Shares of the engine are fair between keys where these are separated, else between users.
        """
        if self.owner and priority < 0:
            raise ForbiddenError(
                f"priority={priority} would put this request before those of other keys; leave it out, or start the "
                "server with --no-separate-keys"
            )
        session = None if session_id in (None, -1) else f"{self.owner}:{session_id}"
        return RequestContext(request_id, self.owner or user, priority, session, adapter, self.owner)

    def session(self, session_id: int) -> SessionKey:
        """The session that the request calls so."""
        return self.owner, session_id


async def _service(request: Request) -> ModelService:
    service: ModelService = request.app.state.service
    return service


async def _tenant(request: Request) -> Tenant:
    key = request.scope.get(KEY_NAME, "") if request.app.state.separates_keys else ""
    named = request.headers.get(TENANT, "") if request.app.state.separates_tenants else ""
    return Tenant(f"{key}/{named}" if _TENANT_NAME.fullmatch(named) else key)


_TENANT_NAME = re.compile(r"[0-9a-f]{16}")


async def need_keys(request: Request) -> None:
    """Raise ``ForbiddenError`` where requests need no key: this is not for everybody who reaches the server."""
    if not request.app.state.needs_keys:
        raise ForbiddenError(
            "adapters are loaded while serving only where requests need a key; start the server with --api-keys KEY, "
            "or give it --adapters NAME=PATH"
        )


async def _reply_id() -> str:
    return uuid.uuid4().hex


Model = Annotated[ModelService, Depends(_service)]
Caller = Annotated[Tenant, Depends(_tenant)]
ReplyId = Annotated[str, Depends(_reply_id)]
"""A new name: the id that a client may send for the log can come twice."""
