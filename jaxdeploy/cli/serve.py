"""``jaxdeploy serve``: the HTTP server, and what goes with it."""

from __future__ import annotations

import sys

from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import EngineConfig, ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import setting, settings

PROGRAMS = {"api_server": "OpenAI-compatible HTTP server"}


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


def add_arguments(parser: Parser) -> None:
    """PROGRAM, MODEL, and every setting of server and engine."""
    parser.add_argument("program", metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, or an id on the hub; default: bundled")
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a file, e.g. `server_port: 8080`")
    add_settings(parser, ServeOptions, ServerConfig, EngineConfig)


def run(args: Namespace) -> int:
    """Serve until told to end."""
    name = args.program.replace("-", "_")
    if name not in PROGRAMS:
        raise ConfigError(f"program={args.program!r} is unknown; choose one of {', '.join(PROGRAMS)}")
    given, of_server, of_engine = read_settings(args, ServeOptions, ServerConfig, EngineConfig)
    options, server_config = ServeOptions(**given), ServerConfig(**of_server)
    bundled = {} if args.model else {"model_name": "jaxdeploy-demo"}
    engine_config = EngineConfig(**{**bundled, **of_engine})
    from jaxdeploy.chat import bundled_model
    from jaxdeploy.server import serve

    serve(
        args.model or bundled_model(),
        engine_config,
        server_config,
        chat_template=options.chat_template,
        log_level=options.log_level,
        progress=sys.stderr.isatty(),
    )
    return 0
