"""``jaxdeploy serve``: the HTTP server, a proxy in front of several, and a terminal chat with one."""

from __future__ import annotations

import sys
from typing import Any

from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import EngineConfig, GenerationConfig, ProxyConfig, ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import setting, settings

PROGRAMS = {
    "api_server": "serve MODEL over HTTP",
    "proxy": "one address for several servers",
    "api_client": "talk with the model that a server at URL has",
}

OF_A_MODEL = (
    "max_concurrent_requests",
    "tool_call_parser",
    "reasoning_parser",
    "proxy_url",
    "proxy_api_key",
    "node_url",
)
"""Settings of a server that a proxy has no use for."""


@settings
class ServeOptions:
    """Options of the program."""

    backend: str | None = setting(
        None, "accepted for LMDeploy's sake: there is one engine", choices=("turbomind", "pytorch")
    )
    chat_template: str | None = setting(
        None, "name (jaxdeploy list), or a JSON or Jinja file; default: the checkpoint's own"
    )
    log_level: str = setting("INFO", "how much to report on stderr", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    api_key: str | None = setting(None, "api_client: the key that the server asks for")
    meta_instruction: str | None = setting(None, "api_client: the system prompt")


def add_arguments(parser: Parser) -> None:
    """PROGRAM, what it is about, and every setting of server, engine and generation."""
    parser.add_argument("program", metavar="PROGRAM", help="; ".join(f"{name}: {do}" for name, do in PROGRAMS.items()))
    parser.add_argument("what", nargs="?", metavar="MODEL|URL", help="a folder, hub id or address; default: bundled")
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a file, e.g. `server_port: 8080`")
    add_settings(parser, ServeOptions, ServerConfig, ProxyConfig, EngineConfig, GenerationConfig)


def run(args: Namespace) -> int:
    """Run the program until told to end."""
    name = args.program.replace("-", "_")
    if name not in PROGRAMS:
        raise ConfigError(f"program={args.program!r} is unknown; choose one of {', '.join(PROGRAMS)}")
    given, of_server, of_proxy, of_engine, of_generation = read_settings(
        args, ServeOptions, ServerConfig, ProxyConfig, EngineConfig, GenerationConfig
    )
    options = ServeOptions(**given)
    if name == "api_client":
        server_config, generation = ServerConfig(**of_server), GenerationConfig(**of_generation)
        return _talk(args.what or f"http://127.0.0.1:{server_config.server_port}", options, generation)
    _refuse(of_generation, "api_client; requests to a server bring their own")
    if name == "proxy":
        _refuse({**of_engine, **{field: None for field in OF_A_MODEL if field in of_server}}, "api_server")
        _stand_in_front(args.what, options, of_server, ProxyConfig(**of_proxy))
        return 0
    _refuse(of_proxy, "proxy")
    bundled = {} if args.what else {"model_name": "jaxdeploy-demo"}
    _serve(args.what, options, ServerConfig(**of_server), EngineConfig(**{**bundled, **of_engine}))
    return 0


def _refuse(given: dict[str, Any], owner: str) -> None:
    """Raise ``ConfigError`` if any setting is ``given`` that belongs to another program."""
    if given:
        raise ConfigError(f"{next(iter(given))} is a flag of {owner}")


def _stand_in_front(what: str | None, options: ServeOptions, of_server: dict[str, Any], config: ProxyConfig) -> None:
    from jaxdeploy.server import serve_proxy

    if what is not None:
        raise ConfigError(f"argument={what!r} is one too many: a proxy has no model; name its servers with --nodes")
    serve_proxy(config, ServerConfig(**{"server_port": 8000, **of_server}), log_level=options.log_level)


def _serve(model: str | None, options: ServeOptions, config: ServerConfig, engine: EngineConfig) -> None:
    from jaxdeploy.chat import bundled_model
    from jaxdeploy.server import serve

    serve(
        model or bundled_model(),
        engine,
        config,
        chat_template=options.chat_template,
        log_level=options.log_level,
        progress=sys.stderr.isatty(),
    )


def _talk(url: str, options: ServeOptions, generation: GenerationConfig) -> int:
    from jaxdeploy.api_client import ApiClient
    from jaxdeploy.chat import Chat
    from jaxdeploy.chat_input import line_reader
    from jaxdeploy.chat_session import Conversation

    client = ApiClient(url, options.api_key)
    Chat(client, generation, Conversation(options.meta_instruction)).run(line_reader(), f"{client.model} at {url}")
    client.close()
    return 0
