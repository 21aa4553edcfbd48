"""All settings of jaxdeploy: the one source of Python arguments, YAML keys and command-line flags.

Field names are LMDeploy's. Some fields of LMDeploy have no meaning here: they are accepted, and one line is logged.
Fields of missing features are accepted by name and raise if they are set. Any other name raises an error that suggests
the nearest field.
"""

from __future__ import annotations

from jaxdeploy.config.chat_template import ChatTemplateConfig
from jaxdeploy.config.engine import EngineConfig
from jaxdeploy.config.fields import LOG_LEVELS
from jaxdeploy.config.generation import GenerationConfig
from jaxdeploy.config.proxy import PROXY_PORT, ProxyConfig
from jaxdeploy.config.quantization import QuantConfig
from jaxdeploy.config.server import ServerConfig
from jaxdeploy.config.speculative import SpeculativeConfig

TurbomindEngineConfig = EngineConfig
PytorchEngineConfig = EngineConfig

__all__ = [
    "LOG_LEVELS",
    "PROXY_PORT",
    "ChatTemplateConfig",
    "EngineConfig",
    "GenerationConfig",
    "ProxyConfig",
    "PytorchEngineConfig",
    "QuantConfig",
    "ServerConfig",
    "SpeculativeConfig",
    "TurbomindEngineConfig",
]
