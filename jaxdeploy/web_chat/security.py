"""What the page may do in a browser, and what of the page's library is closed to it."""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'; "
    "object-src 'none'"
)
"""Content Security Policy (W3C): nothing is fetched from elsewhere, not even a picture that a reply names."""

PATHS = frozenset(
    {
        *(
            "/",
            "/login",
            "/login/",
            "/logout",
            "/config",
            "/theme.css",
            "/favicon.ico",
            "/manifest.json",
            "/robots.txt",
        ),
        *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/reset"),
        *("/gradio_api/login_check", "/gradio_api/app_id", "/gradio_api/startup-events", "/gradio_api/theme.css"),
    }
)
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/run/")
"""What the page asks for. The library's other routes take files, fetch them or run code: a chat needs none of it."""


class PageRules:
    """Sends the policy with every answer, and answers 404 for all paths but those that the page needs.

    A page keeps a stream open as long as it is shown: when the server is told to end, the stream does so in peace.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no web socket
            await send({"type": "websocket.close", "code": 1008})
            return

        open_stream = False

        async def ruled(message: Message) -> None:
            nonlocal open_stream
            open_stream = message["type"] == "http.response.start" or message.get("more_body", False)
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        if scope["path"] not in PATHS and not scope["path"].startswith(FOLDERS):
            await PlainTextResponse("not there", 404)(scope, receive, ruled)
            return
        try:
            await self._app(scope, receive, ruled)
        except asyncio.CancelledError:
            if open_stream:
                await send({"type": "http.response.body", "body": b""})
