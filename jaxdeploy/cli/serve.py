"""``jaxdeploy serve``: the HTTP server, a proxy in front of several, and chats in the terminal and in a browser."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import PROXY_PORT, EngineConfig, GenerationConfig, ProxyConfig, ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import setting, settings

Values: TypeAlias = dict[str, Any]
PROGRAMS = {
    "api_server": "serve MODEL over HTTP",
    "proxy": "one address for several servers",
    "api_client": "talk with the model that a server at URL has",
    "gradio": "a chat in the browser with MODEL, or with that of URL, on port 6006",
}
WEB_PORT = 6006

OF_A_NODE = ("proxy_url", "proxy_api_key", "node_url")
"""Settings of a server that registers with a proxy."""

OF_AN_API = (*OF_A_NODE, "allow_origins", "allow_credentials", "allow_methods", "allow_headers", "disable_fastapi_docs")
"""Settings of a server that mean nothing to a page."""

OF_A_MODEL = ("tool_call_parser", "reasoning_parser", "max_concurrent_requests", "chat_template")
"""Settings that mean nothing to a page over another server."""


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
    api_key: str | None = setting(None, "api_client, gradio: the key that the server at URL asks for")
    adapter_name: str | None = setting(None, "api_client: the LoRA adapter that answers, if not the model itself")
    meta_instruction: str | None = setting(None, "api_client, gradio: the system prompt")


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
    options, generation = ServeOptions(**given), GenerationConfig(**of_generation)
    if name == "proxy":
        _refuse(
            {**of_engine, **_those(of_server, OF_A_NODE), **_those({**given, **of_server}, OF_A_MODEL)}, "api_server"
        )
        _refuse(of_generation, "chats; requests to a server bring their own")
        _stand_in_front(args.what, options, of_server, ProxyConfig(**of_proxy))
        return 0
    _refuse(of_proxy, "proxy")
    server_config = ServerConfig(**of_server)
    if name == "api_client":
        return _talk(args.what or f"http://127.0.0.1:{server_config.server_port}", options, generation)
    bundled = {} if args.what else {"model_name": "jaxdeploy-demo"}
    engine_config = EngineConfig(**{**bundled, **of_engine})
    if name == "gradio":
        _check_flags_of_page(args.what, given, of_server, of_engine)
        page_config = ServerConfig(**{"server_port": WEB_PORT, **of_server})
        return _show(args.what, options, page_config, engine_config, generation)
    _refuse(of_generation, "chats; requests to a server bring their own")
    _serve(args.what, options, server_config, engine_config)
    return 0


def _those(given: Values, names: tuple[str, ...]) -> Values:
    return {name: given[name] for name in names if name in given}


def _refuse(given: Values, owner: str) -> None:
    """Raise ``ConfigError`` if any setting is ``given`` that belongs to another program."""
    if given:
        raise ConfigError(f"{next(iter(given))} is a flag of {owner}")


def _stand_in_front(what: str | None, options: ServeOptions, of_server: Values, config: ProxyConfig) -> None:
    from jaxdeploy.server import serve_proxy

    if what is not None:
        raise ConfigError(f"argument={what!r} is one too many: a proxy has no model; name its servers with --nodes")
    serve_proxy(config, ServerConfig(**{"server_port": PROXY_PORT, **of_server}), log_level=options.log_level)


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

    client = ApiClient(url, options.api_key, options.adapter_name)
    Chat(client, generation, Conversation(options.meta_instruction)).run(line_reader(), f"{client.model} at {url}")
    client.close()
    return 0


def _check_flags_of_page(what: str | None, given: Values, of_server: Values, of_engine: Values) -> None:
    """Raise ``ConfigError`` for a flag that would do nothing."""
    from jaxdeploy.api_client import is_url

    remote = is_url(what or "")
    for name in OF_AN_API:
        if name in of_server:
            raise ConfigError(f"{name} is a flag of api_server; leave it out")
    for name in [*of_engine, *(name for name in OF_A_MODEL if name in of_server or name in given)] if remote else []:
        raise ConfigError(f"{name} is a flag for a MODEL; give it to the server at URL")
    if "api_key" in given and not remote:
        raise ConfigError("api_key is for a server at URL; --api-keys has users of the page bring a key")


def _show(
    what: str | None, options: ServeOptions, config: ServerConfig, engine: EngineConfig, generation: GenerationConfig
) -> int:
    from jaxdeploy.chat import bundled_model

    try:
        from jaxdeploy.web_chat.dialogue import Manner
        from jaxdeploy.web_chat.run import web_chat
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxdeploy"):
            raise
        message = f"the web chat needs {error.name}, which is missing; pip install 'jaxdeploy[gradio]'"
        raise ConfigError(message) from None
    web_chat(
        what or bundled_model(),
        Manner(options.meta_instruction or "", generation),
        config,
        engine_config=engine,
        api_key=options.api_key,
        chat_template=options.chat_template,
        log_level=options.log_level,
        progress=sys.stderr.isatty(),
    )
    return 0
