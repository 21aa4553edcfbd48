"""The HTTP server: OpenAI's API and others', in front of the asynchronous engine; and a proxy in front of servers.

The two are imported when they are asked for: a proxy needs neither jax nor an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxdeploy.engine.process import exit_if_imported_again
from jaxdeploy.errors import ConfigError

__all__ = ["serve", "serve_proxy"]


def serve(model: str, *args: Any, **kwargs: Any) -> None:
    """``jaxdeploy.server.run.serve``. Raises ``ConfigError`` where a package or the script's main guard is missing."""
    exit_if_imported_again()
    with _packages("server"):
        from jaxdeploy.server.run import serve as run
    run(model, *args, **kwargs)


def serve_proxy(*args: Any, **kwargs: Any) -> None:
    """``jaxdeploy.server.proxy.run.serve_proxy``. Raises ``ConfigError`` where a package is missing."""
    with _packages("proxy"):
        from jaxdeploy.server.proxy.run import serve_proxy as run
    run(*args, **kwargs)


@contextmanager
def _packages(program: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxdeploy"):
            raise
        raise ConfigError(
            f"the {program} needs {error.name}, which is missing; pip install 'jaxdeploy[serve]'"
        ) from None
