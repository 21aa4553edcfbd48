"""The HTTP server: OpenAI's API and others', in front of the asynchronous engine; and a proxy in front of servers.

The two are imported when they are asked for: a proxy needs neither jax nor an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxdeploy.config import ChatTemplateConfig, EngineConfig, ProxyConfig, ServerConfig
from jaxdeploy.engine.front.process import exit_if_imported_again
from jaxdeploy.errors import ConfigError

__all__ = ["serve", "serve_proxy"]


def serve(
    model: str,
    engine_config: EngineConfig | None = None,
    server_config: ServerConfig | None = None,
    *,
    chat_template: ChatTemplateConfig | str | None = None,
    log_level: str = "INFO",
    progress: bool = False,
) -> None:
    """Call ``jaxdeploy.server.run.serve``.

    Raises ``ConfigError`` if a package or the script's main guard is missing.
    """
    exit_if_imported_again()
    with _packages("server"):
        from jaxdeploy.server.run import serve as run
    run(model, engine_config, server_config, chat_template=chat_template, log_level=log_level, progress=progress)


def serve_proxy(
    config: ProxyConfig | None = None, server_config: ServerConfig | None = None, *, log_level: str = "INFO"
) -> None:
    """Call ``jaxdeploy.server.proxy.run.serve_proxy``. Raises ``ConfigError`` if a package is missing."""
    with _packages("proxy"):
        from jaxdeploy.server.proxy.run import serve_proxy as run
    run(config, server_config, log_level=log_level)


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
