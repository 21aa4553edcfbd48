"""Reads the keys of a server from its settings, a file, or the environment."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError

ENVIRONMENT = "JAXDEPLOY_API_KEYS"
MAX_BYTES = 2**20
"""Bytes of a file of keys that are read."""


def with_keys(config: ServerConfig) -> ServerConfig:
    """Return ``config`` with its keys in ``api_keys``: those given there, of its file, or of the environment.

    Raises:
        ConfigError: the file cannot be read, a key is empty, or a place that is named has no key.
    """
    if config.api_keys is not None and config.api_keys_file is not None:
        raise ConfigError("api_keys and api_keys_file are both given; leave one of them out")
    if config.api_keys_file is not None:
        keys = _in_file(Path(config.api_keys_file))
    elif config.api_keys is not None:
        keys = config.api_keys
    elif ENVIRONMENT in os.environ:
        keys = os.environ[ENVIRONMENT].split()
        if not keys:
            raise ConfigError(f"{ENVIRONMENT} is set and has no key; put keys there, or unset it")
    else:
        return config
    return replace(config, api_keys=keys, api_keys_file=None)


def _in_file(path: Path) -> list[str]:
    """Return the keys of a file, one on each line. Empty lines and those that begin with ``#`` are skipped."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:  # ValueError: also a name that the file system does not take
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"api_keys_file={str(path)!r} cannot be read ({reason}); name a text file") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"api_keys_file={str(path)!r} has more than {MAX_BYTES} bytes; name a file of keys")
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"api_keys_file={str(path)!r} has no key; write one on each line")
    return keys
