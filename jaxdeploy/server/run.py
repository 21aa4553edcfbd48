"""Load a model and serve it until the process is told to end."""

from __future__ import annotations

import logging

from jaxdeploy.config import ChatTemplateConfig, EngineConfig, ServerConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.errors import ConfigError
from jaxdeploy.server.app import create_app
from jaxdeploy.server.keys import with_keys
from jaxdeploy.server.listening import address, bound, certificate, listen
from jaxdeploy.server.logs import set_up_logging
from jaxdeploy.server.service import ModelService

logger = logging.getLogger("jaxdeploy")


def serve(
    model: str,
    engine_config: EngineConfig | None = None,
    server_config: ServerConfig | None = None,
    *,
    chat_template: ChatTemplateConfig | str | None = None,
    log_level: str = "INFO",
    progress: bool = False,
) -> None:
    """Serve ``model``, a folder or a hub id, until SIGINT or SIGTERM; replies that run then are finished first.

    An engine whose process dies is restarted (``Supervisor``).

    Raises:
        JaxdeployError: a setting, the checkpoint or the memory does not fit; the message says what to do.
        EngineDiedError: the engine died again and again.
    """
    engine_config, config = engine_config or EngineConfig(), with_keys(server_config or ServerConfig())
    set_up_logging(log_level, config.log_format)
    certificate(config)
    with bound(config) as sockets:
        service = load(model, engine_config, config, chat_template=chat_template, progress=progress)
        engine = service.engine

        def began() -> None:
            logger.info("%s is served at %s", service.name, address(config))

        try:
            listen(create_app(service, config), config, sockets, began=began, ended=lambda: engine.failure is not None)
        finally:
            engine.close()
        engine.check()


def load(
    model: str,
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    chat_template: ChatTemplateConfig | str | None = None,
    progress: bool = False,
) -> ModelService:
    """``model`` with an engine in a process of its own, as routes want it. Raises ``JaxdeployError``."""
    name = engine_config.model_name or model
    if name in (engine_config.adapters or {}):
        raise ConfigError(f"adapters={name!r} is the name of the model; choose another, or name the model (model_name)")
    return ModelService(
        AsyncEngine.from_pretrained(model, engine_config, chat_template=chat_template, progress=progress),
        name,
        config.max_concurrent_requests,
        adapters=engine_config.adapters,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
