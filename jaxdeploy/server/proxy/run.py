"""Run a proxy until the process is told to end."""

from __future__ import annotations

import logging

from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.server.listening import address, certificate, listen
from jaxdeploy.server.logs import set_up_logging
from jaxdeploy.server.proxy.app import create_proxy_app

logger = logging.getLogger("jaxdeploy")

PORT = 8000
"""LMDeploy's."""


def serve_proxy(
    config: ProxyConfig | None = None, server_config: ServerConfig | None = None, *, log_level: str = "INFO"
) -> None:
    """Stand in front of servers until SIGINT or SIGTERM; replies that run then are finished first.

    Raises:
        JaxdeployError: a setting is wrong; the message says what to do.
    """
    config, server_config = config or ProxyConfig(), server_config or ServerConfig(server_port=PORT)
    set_up_logging(log_level, server_config.log_format)
    certificate(server_config)
    app = create_proxy_app(config, server_config)
    logger.info("a proxy listens at %s (%s)", address(server_config), config.routing_strategy)
    listen(app, server_config)
