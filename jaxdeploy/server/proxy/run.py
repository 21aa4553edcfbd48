"""Run a proxy until the process is told to end."""

from __future__ import annotations

import logging
import resource
from contextlib import suppress

from jaxdeploy.config import PROXY_PORT, ProxyConfig, ServerConfig
from jaxdeploy.server.listening import address, bound, certificate, listen
from jaxdeploy.server.logs import set_up_logging
from jaxdeploy.server.proxy.app import create_proxy_app

logger = logging.getLogger("jaxdeploy")


def serve_proxy(
    config: ProxyConfig | None = None, server_config: ServerConfig | None = None, *, log_level: str = "INFO"
) -> None:
    """Stand in front of servers until SIGINT or SIGTERM; replies that run then are finished first.

    Raises:
        JaxdeployError: a setting is wrong; the message says what to do.
    """
    config, server_config = config or ProxyConfig(), server_config or ServerConfig(server_port=PROXY_PORT)
    set_up_logging(log_level, server_config.log_format)
    certificate(server_config)
    _allow_connections()

    app = create_proxy_app(config, server_config)

    def began() -> None:
        if app.state.operators.open:
            logger.warning("anyone who reaches the proxy can add nodes to it; start it with --operator-keys KEY")
        logger.info("a proxy listens at %s (%s)", address(server_config), config.routing_strategy)

    with bound(server_config) as sockets:
        listen(app, server_config, sockets, began=began)


def _allow_connections() -> None:
    """As many as the system lets us have; each request takes two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where that is not for us to say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
