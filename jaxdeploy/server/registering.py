"""A server that tells a proxy of itself, as long as it runs."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError

logger = logging.getLogger("jaxdeploy")

AGAIN_SECONDS = 10.0
"""Seconds after which it tells again: a proxy that was restarted knows nothing."""
SOON_SECONDS = 1.0
"""The same after a proxy that did not answer."""
PATIENCE = 30.0
"""Seconds that a proxy has to answer; it looks at the server meanwhile."""
FAREWELL = 5.0
"""The same when the server ends."""
ANYWHERE = frozenset({"", "0.0.0.0", "::"})


@asynccontextmanager
async def registered(config: ServerConfig) -> AsyncIterator[None]:
    """The time in which the proxy of ``config``, if it names one, sends requests here."""
    if config.proxy_url is None:
        yield
        return
    headers = {"Authorization": f"Bearer {config.proxy_api_key}"} if config.proxy_api_key else {}
    async with httpx2.AsyncClient(headers=headers, trust_env=False) as http:
        telling = asyncio.create_task(_tell(http, config))
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.wait({telling})
            await _fault(http, config, "remove", FAREWELL)


def own_url(config: ServerConfig) -> str:
    """The address of this server as the proxy reaches it. Raises ``ConfigError`` where that cannot be told."""
    if config.node_url is not None:
        return config.node_url
    host = _towards(config.proxy_url or "") if config.server_name in ANYWHERE else config.server_name
    return f"{'https' if config.ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{config.server_port}"


async def _tell(http: httpx2.AsyncClient, config: ServerConfig) -> None:
    """Again and again; the log has the first answer, and each time that it is another one."""
    before: str | None = "not asked yet"
    while True:
        fault = await _fault(http, config, "add", PATIENCE)
        if fault != before and fault is None:
            logger.info("registered with the proxy %s as %s", config.proxy_url, own_url(config))
        elif fault != before:
            logger.warning("the proxy %s does not take this server yet: %s", config.proxy_url, fault)
        before = fault
        await asyncio.sleep(AGAIN_SECONDS if fault is None else SOON_SECONDS)


async def _fault(http: httpx2.AsyncClient, config: ServerConfig, what: str, patience: float) -> str | None:
    """Have the proxy add or remove this server; why it has not."""
    url = f"{(config.proxy_url or '').rstrip('/')}/nodes/{what}"
    try:
        told = {"url": own_url(config)}
        if config.api_keys and what == "add":
            told["api_key"] = config.api_keys[0]  # the proxy needs it, and shows it to nobody else
        response = await http.post(url, json=told, timeout=patience)
    except (httpx2.HTTPError, httpx2.InvalidURL, ConfigError) as error:
        return str(error) or type(error).__name__
    return None if response.status_code == 200 else f"it answers {response.status_code}: {response.text:.200}"


def _towards(proxy: str) -> str:
    """The address of this machine in the network in which ``proxy`` is; nothing is sent."""
    url = httpx2.URL(proxy)
    try:
        found = socket.getaddrinfo(url.host, url.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, there = found[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.connect(there)
            return str(trial.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"proxy_url={proxy!r} cannot be resolved ({error}); correct it or give node_url") from None
