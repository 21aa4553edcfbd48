"""Quantise, run and serve large language models with JAX on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

from jaxdeploy.config import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    PytorchEngineConfig,
    QuantConfig,
    TurbomindEngineConfig,
)
from jaxdeploy.pipeline import Pipeline, pipeline
from jaxdeploy.response import Response, Session

__all__ = [
    "ChatTemplateConfig",
    "EngineConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "QuantConfig",
    "Response",
    "Session",
    "TurbomindEngineConfig",
    "pipeline",
    "quantize",
    "serve",
]
__version__ = "0.1.0"


def quantize(model: str, config: QuantConfig | None = None, **settings: Any) -> Any:
    """Make a model small; see ``jaxdeploy.compress.quantize.quantize``, which this calls."""
    from jaxdeploy.compress.quantize import quantize as run

    return run(model, config, **settings)


def serve(*args: Any, **kwargs: Any) -> Any:
    """Start the HTTP server. Raises ``JaxdeployError`` as long as there is none."""
    from importlib import import_module
    from importlib.util import find_spec

    from jaxdeploy.errors import JaxdeployError

    if find_spec("jaxdeploy.server") is None:
        raise JaxdeployError("jaxdeploy.serve arrives with the HTTP server; use pipeline() meanwhile")
    return import_module("jaxdeploy.server").serve(*args, **kwargs)
