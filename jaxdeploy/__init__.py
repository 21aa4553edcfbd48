"""Quantise, run and serve large language models with JAX on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

from jaxdeploy.config import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    PytorchEngineConfig,
    QuantConfig,
    ServerConfig,
    SpeculativeConfig,
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
    "ServerConfig",
    "Session",
    "SpeculativeConfig",
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


def serve(model: str, *args: Any, **kwargs: Any) -> None:
    """Serve ``model`` over HTTP; see ``jaxdeploy.server.run.serve``, which this calls."""
    from jaxdeploy.server import serve as run

    run(model, *args, **kwargs)
