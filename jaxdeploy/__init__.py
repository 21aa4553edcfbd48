"""Quantise, run and serve large language models with JAX on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxdeploy.api.arguments import any_order, check_backend, config_of, split_settings, without_unused
from jaxdeploy.api.loading import pipeline
from jaxdeploy.api.pipeline import Pipeline
from jaxdeploy.api.response import Response, Session
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

if TYPE_CHECKING:
    from jaxdeploy.api.client import ApiClient

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
    "client",
    "pipeline",
    "quantize",
    "serve",
]
__version__ = "0.1.0"

ELSEWHERE = {
    "EngineGenerationConfig": "GenerationConfig has stop_token_ids and bad_token_ids",
    "Tokenizer": "Pipeline.tokenizer is the tokenizer of a loaded model",
    "VisionConfig": "models read text only",
    "version_info": "__version__ is a text",
}
"""Names of LMDeploy's that are not there, and what to use."""


def quantize(model: str, config: QuantConfig | None = None, **settings: Any) -> Any:
    """Make a model small; see ``jaxdeploy.compress.quantize.quantize``, which this calls."""
    from jaxdeploy.compress.quantize import quantize as run

    return run(model, config, **settings)


@any_order
def serve(
    model_path: str,
    model_name: str | None = None,
    backend: str | None = None,
    backend_config: EngineConfig | Mapping[str, Any] | None = None,
    chat_template_config: ChatTemplateConfig | Mapping[str, Any] | str | None = None,
    server_name: str | None = None,
    server_port: int | None = None,
    log_level: str = "INFO",
    api_keys: Sequence[str] | str | None = None,
    ssl: bool | None = None,
    *,
    server_config: ServerConfig | Mapping[str, Any] | None = None,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM; replies that run then are finished first.

    The arguments are LMDeploy's, whose ``serve`` starts a process and returns a client; this one returns at the end.
    A positional config is recognised by its type.

    Args:
        model_path: a folder with a checkpoint, or a model's id on the Hugging Face hub.
        model_name: how requests call the model; the name of a built-in chat template counts as that too.
        backend: accepted; there is one engine.
        backend_config: how the engine runs; an ``EngineConfig``, or a mapping of its fields.
        chat_template_config: a config, a built-in template's name, or a JSON or Jinja file; default: the checkpoint's.
        server_name: address to listen on.
        server_port: port to listen on.
        log_level: how much is reported on stderr.
        api_keys: keys of which every request must bring one.
        ssl: speak HTTPS.
        server_config: how the server listens.
        progress: show progress bars on stderr.
        **settings: fields of ``EngineConfig`` and ``ServerConfig``, laid over the configs.

    Raises:
        JaxdeployError: a setting, the checkpoint or the memory does not fit; the message says what to do.
    """
    from jaxdeploy.server import serve as run

    check_backend(backend)
    if isinstance(chat_template_config, Mapping):
        chat_template_config = ChatTemplateConfig(**chat_template_config)
    named = {
        "model_name": model_name,
        "server_name": server_name,
        "server_port": server_port,
        "api_keys": api_keys,
        "ssl": ssl,
    }
    engine, server = split_settings(
        {**{name: value for name, value in named.items() if value is not None}, **without_unused(settings)},
        config_of(EngineConfig, backend_config, "backend_config"),
        config_of(ServerConfig, server_config, "server_config"),
    )
    run(model_path, engine, server, chat_template=chat_template_config, log_level=log_level, progress=progress)


def client(api_server_url: str = "http://127.0.0.1:23333", api_key: str | None = None) -> ApiClient:
    """A client of the server at ``api_server_url``, as the terminal chat uses it.

    It has ``session``, ``stream_infer`` and ``stop_session``. Other routes are for OpenAI's client, or LMDeploy's own
    ``APIClient``, which works unchanged.

    Raises:
        JaxdeployError: the server cannot be reached, or refuses the key.
    """
    from jaxdeploy.api.client import ApiClient

    return ApiClient(api_server_url, api_key)


def __getattr__(name: str) -> Any:
    """Raise an ``ImportError`` that says what to use in place of a name that only LMDeploy has."""
    if name in ELSEWHERE:
        raise ImportError(f"jaxdeploy has no {name}; {ELSEWHERE[name]}")
    raise AttributeError(f"module 'jaxdeploy' has no attribute {name!r}")
