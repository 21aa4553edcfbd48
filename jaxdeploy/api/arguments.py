"""Arguments of LMDeploy's Python functions. Their order differs between versions, so types decide."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from jaxdeploy.config import (
    LOG_LEVELS,
    ChatTemplateConfig,
    EngineConfig,
    ServerConfig,
    SpeculativeConfig,
)
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.stored import shown
from jaxdeploy.settings import describe, unknown_setting

P = ParamSpec("P")
T = TypeVar("T")

OWNERS: Mapping[type[Any], str] = {
    EngineConfig: "backend_config",
    ServerConfig: "server_config",
    ChatTemplateConfig: "chat_template_config",
    SpeculativeConfig: "speculative_config",
}
"""Type → the argument that takes it."""

BACKENDS = (None, "turbomind", "pytorch")
"""LMDeploy's engines, in whose place there is one."""

UNUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "allowed_media_domains": ("models read text only", ()),
    "vision_config": ("models read text only", ()),
    "image_url": ("models read text only", ()),
    "sessions": ("Pipeline.chat continues a conversation", ()),
    "stream_response": ("a call has whole replies, stream_infer has pieces", (True,)),
}
"""Arguments of LMDeploy's without a meaning here: what to do instead, and which values pass."""


def any_order(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a positional argument whose type belongs to another argument is taken as that one."""
    parameters = inspect.signature(function).parameters.values()
    places = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def called(*positional: Any, **named: Any) -> T:
        if len(positional) > len(places):
            raise ConfigError(f"argument={shown(positional[-1])} is one too many; name the arguments")
        for name, value in zip(places, positional, strict=False):
            if value is None:
                continue
            owner = _owner(name, value)
            if named.get(owner) is not None:
                raise ConfigError(f"{owner} is given twice; leave {shown(value)} out")
            named[owner] = value
        return function(**named)  # type: ignore[call-arg]

    return called


def config_of(kind: type[T], value: Any, name: str) -> T:
    """Return ``value`` as a ``kind``; a mapping has its fields, ``None`` its defaults. Raises ``ConfigError``."""
    if value is None:
        return kind()
    if isinstance(value, Mapping):
        return kind(**value)
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={shown(value)} must be a {kind.__name__}, or a mapping of its fields; make one")
    return value


def split_settings(given: Mapping[str, Any], *configs: Any) -> list[Any]:
    """Return ``configs``, each with the settings of ``given`` that it has.

    Raises:
        ConfigError: none has a setting of a name, or a value is wrong.
    """
    known = [describe(type(config)) for config in configs]
    for name, value in given.items():
        if not any(name in names for names in known):
            every = [name for names in known for name in names]
            raise unknown_setting(name, value, every, " or ".join(type(config).__name__ for config in configs))
    return [
        replace(config, **{name: value for name, value in given.items() if name in names})
        for config, names in zip(configs, known, strict=True)
    ]


def without_unused(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` without LMDeploy's arguments in ``UNUSED``. Raises ``ConfigError`` for one with a value."""
    for name, (advice, fine) in UNUSED.items():
        if name in given and given[name] not in (None, [], *fine):
            raise ConfigError(f"{name}={shown(given[name])} is not there; {advice}")
    return {name: value for name, value in given.items() if name not in UNUSED}


def check_backend(name: str | None) -> None:
    """Raise ``ConfigError`` unless LMDeploy has an engine of this name."""
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r} is not one of turbomind, pytorch; leave it out, there is one engine")


def _owner(name: str, value: Any) -> str:
    """Return the name of the argument that a value given as ``name`` is for."""
    for kind, owner in OWNERS.items():
        if isinstance(value, kind):
            return owner
    if isinstance(value, str) and name == "backend_config":
        return "model_name"  # LMDeploy 0.3 to 0.5 have it in second place
    if isinstance(value, str) and name == "max_log_len" and value.upper() in LOG_LEVELS:
        return "log_level"
    return name
