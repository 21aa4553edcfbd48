"""``jaxdeploy serve``: the HTTP server, and a terminal chat with one."""

from __future__ import annotations

import sys

from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import EngineConfig, GenerationConfig, ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import setting, settings

PROGRAMS = {
    "api_server": "serve MODEL over HTTP",
    "api_client": "talk with the model that a server at URL has",
}


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
    add_settings(parser, ServeOptions, ServerConfig, EngineConfig, GenerationConfig)


def run(args: Namespace) -> int:
    """Run the program until told to end."""
    name = args.program.replace("-", "_")
    if name not in PROGRAMS:
        raise ConfigError(f"program={args.program!r} is unknown; choose one of {', '.join(PROGRAMS)}")
    given, of_server, of_engine, of_generation = read_settings(
        args, ServeOptions, ServerConfig, EngineConfig, GenerationConfig
    )
    options, server_config = ServeOptions(**given), ServerConfig(**of_server)
    generation = GenerationConfig(**of_generation)
    if name == "api_client":
        return _talk(args.what or f"http://127.0.0.1:{server_config.server_port}", options, generation)
    if of_generation:
        raise ConfigError(f"{next(iter(of_generation))} is a flag of api_client; requests to a server bring their own")
    bundled = {} if args.what else {"model_name": "jaxdeploy-demo"}
    _serve(args.what, options, server_config, EngineConfig(**{**bundled, **of_engine}))
    return 0


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
