"""``pipeline("MODEL")``: loads a model for the Python API."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdeploy.api.arguments import any_order, config_of, split_settings, without_unused
from jaxdeploy.api.pipeline import Pipeline
from jaxdeploy.config import ChatTemplateConfig, EngineConfig, SpeculativeConfig
from jaxdeploy.errors import ConfigError

logger = logging.getLogger("jaxdeploy")


@any_order
def pipeline(
    model_path: str | Path,
    backend_config: EngineConfig | Mapping[str, Any] | str | None = None,
    chat_template_config: ChatTemplateConfig | Mapping[str, Any] | str | None = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool | None = None,
    speculative_config: SpeculativeConfig | None = None,
    *,
    model_name: str | None = None,
    **settings: Any,
) -> Pipeline:
    """Load a model and make it ready to answer.

    LMDeploy's versions order these arguments differently. A positional config is recognised by its type, and a text in
    second place is ``model_name``, as in LMDeploy 0.3.

    Args:
        model_path: a folder with a checkpoint, or a model's id on the Hugging Face hub.
        backend_config: how the engine runs; an ``EngineConfig``, or a mapping of its fields.
        chat_template_config: a config, a built-in template's name, or a JSON or Jinja file; default: the checkpoint's.
        log_level: DEBUG, INFO, WARNING, ERROR or CRITICAL, for the logger ``jaxdeploy``.
        max_log_len: accepted and ignored; prompts are not logged.
        trust_remote_code: accepted and ignored; code of a checkpoint is never run.
        speculative_config: how tokens are drafted, as in LMDeploy; it sets the same fields of ``EngineConfig``.
        model_name: the name of a built-in chat template. Other names change nothing.
        **settings: fields of ``EngineConfig``, laid over ``backend_config``.

    Raises:
        JaxdeployError: a setting, the checkpoint or the memory does not fit; the message says what to do.
    """
    from jaxdeploy.engine.front.generator import Generator

    set_log_level(log_level)
    if isinstance(chat_template_config, Mapping):
        chat_template_config = ChatTemplateConfig(**chat_template_config)
    config = config_of(EngineConfig, backend_config, "backend_config")
    speculative = speculative_config.fields if speculative_config is not None else {}
    unheeded = {"max_log_len": max_log_len, "trust_remote_code": trust_remote_code}
    (config,) = split_settings({**speculative, **unheeded, **without_unused(settings)}, config)
    template = chat_template_config or _template_named(model_name or config.model_name)
    bars = sys.stderr.isatty()
    return Pipeline(Generator.from_pretrained(str(model_path), config, chat_template=template, progress=bars))


def set_log_level(level: str) -> None:
    """Set the level of the logger ``jaxdeploy``, and show its lines on stderr. Raises ``ConfigError``."""
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        raise ConfigError(f"log_level={level!r} is not one of DEBUG, INFO, WARNING, ERROR; take one of these")
    logger.setLevel(names[level.upper()])
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def _template_named(name: str | None) -> str | None:
    """The built-in template of this name; LMDeploy 0.3 chose templates by the model's name."""
    if name is None:
        return None
    from jaxdeploy.chat_template.builtin import find_builtin

    if find_builtin(name) is not None:
        return name
    logger.warning("model_name=%r has no meaning here: the chat template is the checkpoint's own", name)
    return None
