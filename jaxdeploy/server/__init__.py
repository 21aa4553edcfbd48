"""The HTTP server: OpenAI's API and others', in front of the asynchronous engine."""

from __future__ import annotations

from jaxdeploy.errors import ConfigError

try:
    from jaxdeploy.server.run import serve
except ModuleNotFoundError as error:
    if (error.name or "").startswith("jaxdeploy"):
        raise
    raise ConfigError(f"the server needs {error.name}, which is missing; pip install 'jaxdeploy[serve]'") from None

__all__ = ["serve"]
