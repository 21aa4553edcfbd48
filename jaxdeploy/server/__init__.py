"""The HTTP server: OpenAI's API and others', in front of the asynchronous engine."""

from __future__ import annotations

from jaxdeploy.server.run import serve

__all__ = ["serve"]
