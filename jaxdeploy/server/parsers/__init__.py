"""What models write beside text: calls of tools, and thoughts. A new form is a module here and a line below.

A module of calls has ``parser()``; ``SIGN``, by which a chat template tells that it has this form; and what a grammar
needs to have calls written so: ``BEGIN``, ``BETWEEN`` and ``END`` around them, and the name of their ``ARGUMENTS``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from jaxdeploy.errors import ConfigError

TOOL_PARSERS = {
    "hermes": "hermes",
    "qwen": "hermes",
    "qwen2d5": "hermes",
    "qwen3": "hermes",
    "llama3": "llama3",
    "internlm": "internlm2",
    "internlm2": "internlm2",
    "mistral": "mistral",
}
"""Name, among them LMDeploy's → module."""

REASONING_PARSERS = {"think": "think", "deepseek-r1": "think", "qwen-qwq": "think", "qwen3": "think"}


def tool_form(name: str | None, template: str | None) -> ModuleType | None:
    """The module of ``name``, or of the form that the chat template's source tells of. Raises ``ConfigError``."""
    if name is not None:
        return _named("tool_call_parser", name, TOOL_PARSERS)
    forms = [_module(module) for module in dict.fromkeys(TOOL_PARSERS.values())]
    return next((form for form in forms if template is not None and form.SIGN in template), None)


def reasoning_form(name: str | None, template: str | None) -> ModuleType | None:
    """The same for thoughts."""
    if name is not None:
        return _named("reasoning_parser", name, REASONING_PARSERS)
    form = _module("think")
    return form if template is not None and form.SIGN in template else None


def _named(setting: str, name: str, known: dict[str, str]) -> ModuleType:
    if name not in known:
        raise ConfigError(f"{setting}={name!r} is unknown; choose one of {', '.join(known)}")
    return _module(known[name])


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
