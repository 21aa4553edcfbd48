"""A line in the log for every request, with the id that the client is told too."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdeploy.server.logs import current_request

logger = logging.getLogger("jaxdeploy.server")

POLLED = frozenset({"/health", "/metrics", "/v1/models", "/nodes/add"})
"""Asked again and again by machines."""

HEADER = "x-request-id"
_USABLE = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class RequestLog:
    """Gives a request its id, the client's own if it sent a usable one, and logs what became of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _USABLE.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        current_request.set(request_id)
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            took = time.monotonic() - begun
            what = {"request_id": request_id, "status": status, "seconds": round(took, 3)}
            level = logging.DEBUG if scope["path"] in POLLED and status == 200 else logging.INFO
            logger.log(level, "%s %s", scope["method"], scope["path"], extra=what)
