"""``jaxdeploy serve``: the HTTP server, a proxy in front of several, and chats in the terminal and in a browser."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any, NamedTuple, TypeAlias

from jaxdeploy.cli.chat import template_config
from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import LOG_LEVELS, PROXY_PORT, EngineConfig, GenerationConfig, ProxyConfig, ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.server.keys import with_keys
from jaxdeploy.settings import from_environment, ignored, missing, secret, setting, settings

Values: TypeAlias = dict[str, Any]
PROGRAMS = {
    "api_server": "serve MODEL over HTTP",
    "proxy": "one address for several servers",
    "api_client": "talk with the model that a server at URL has",
    "gradio": "a chat in the browser with MODEL, or with that of URL, on port 6006",
}
WEB_PORT = 6006

OF_A_NODE = frozenset({"proxy_url", "proxy_api_key", "node_url"})
"""Settings of a server that registers with a proxy."""

OF_AN_API = frozenset(
    {*OF_A_NODE, "allow_origins", "allow_credentials", "allow_methods", "allow_headers", "disable_fastapi_docs"}
    | {"separate_keys"}
)
"""Settings of a server that mean nothing to a page."""

OF_A_MODEL = frozenset({"tool_call_parser", "reasoning_parser", "max_concurrent_requests", "chat_template", "cap"})
"""Settings of programs that load a model."""


NEEDS = {
    "proxy_api_key": "proxy_url",
    "node_url": "proxy_url",
    "ssl_certfile": "ssl",
    "ssl_keyfile": "ssl",
    "allow_credentials": "allow_origins",
    "allow_methods": "allow_origins",
    "allow_headers": "allow_origins",
}
"""Setting of a server → the one without which it has no effect."""


@settings
class ServeOptions:
    """Options of the program."""

    backend: str | None = setting(
        None, "accepted for LMDeploy's sake: there is one engine", choices=("turbomind", "pytorch")
    )
    chat_template: str | None = setting(
        None, "name (jaxdeploy list), or a JSON or Jinja file; default: the checkpoint's own"
    )
    cap: str | None = setting(
        None,
        "chat, or completion: continue raw text",
        choices=("chat", "completion", "infilling", "python"),
    )
    log_level: str = setting("INFO", "how much to report on stderr", choices=LOG_LEVELS)
    api_key: str | None = secret(
        "api_client, gradio: the key that the server at URL asks for; default: JAXDEPLOY_API_KEY"
    )
    adapter_name: str | None = setting(None, "api_client: the LoRA adapter that answers, if not the model itself")
    meta_instruction: str | None = setting(
        None, "the system prompt; api_server: of conversations that begin without one"
    )

    allow_terminate_by_client: bool | None = missing("end the process with SIGTERM")
    allowed_media_domains: list[str] | None = missing("models read text only")
    disable_metrics: bool | None = ignored("metrics cost next to nothing")
    enable_abort_handling: bool | None = ignored("/abort_request is always there")
    generation_config: str | None = missing("generation_config.json of the model counts", "auto")
    qos_config_path: str | None = missing("tenants share the engine fairly, and requests have a priority")
    session_id: int | None = ignored("the client sends the whole conversation each time")
    vision_max_batch_size: int | None = ignored("models read text only")


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
    given = Given(*read_settings(args, ServeOptions, ServerConfig, ProxyConfig, EngineConfig, GenerationConfig))
    for setting_, needed in NEEDS.items():
        if setting_ in given.server and not given.server.get(needed):
            raise ConfigError(f"{setting_} has no effect without {needed}; add {needed}, or leave {setting_} out")
    return {"api_server": _api_server, "proxy": _proxy, "api_client": _api_client, "gradio": _gradio}[name](
        args.what, given
    )


class Given(NamedTuple):
    """The settings that were given, by the class that they belong to."""

    options: Values
    server: Values
    proxy: Values
    engine: Values
    generation: Values

    def only(self, owner: str, *, of: str, names: Container[str]) -> None:
        """Raise ``ConfigError`` for a setting that was given in the group ``of`` and is none of ``names``."""
        for name in getattr(self, of):
            if name not in names:
                raise ConfigError(f"{name} is a flag of {owner}; leave it out")

    def without(self, owner: str, *names: str) -> None:
        """Raise ``ConfigError`` for one of ``names`` that was given."""
        for name in names:
            if name in self.options or name in self.server:
                raise ConfigError(f"{name} is a flag of {owner}; leave it out")


CHATS = "chats; requests to a server bring their own"


def _api_server(model: str | None, given: Given) -> int:
    given.without("api_client and gradio", "api_key", "adapter_name")
    given.only("proxy", of="proxy", names=())
    given.only(CHATS, of="generation", names=())
    options = ServeOptions(**given.options)
    bundled = {} if model else {"model_name": "jaxdeploy-demo"}
    proxy_key = from_environment("proxy_api_key") if "proxy_url" in given.server else {}
    config = with_keys(ServerConfig(**{**proxy_key, **given.server}))
    _serve(model, options, config, EngineConfig(**{**bundled, **given.engine}))
    return 0


def _proxy(what: str | None, given: Given) -> int:
    given.without("api_server", *OF_A_NODE, *OF_A_MODEL, "separate_keys")
    given.without("chats", "api_key", "adapter_name", "meta_instruction")
    given.only("api_server", of="engine", names=())
    given.only(CHATS, of="generation", names=())
    operators = {name: keys.split() for name, keys in from_environment("operator_keys").items()}
    config = ProxyConfig(**{**from_environment("node_api_key"), **operators, **given.proxy})
    server_config = with_keys(ServerConfig(**{"server_port": PROXY_PORT, **given.server}))
    _stand_in_front(what, ServeOptions(**given.options), server_config, config)
    return 0


def _api_client(url: str | None, given: Given) -> int:
    given.without("api_server", *OF_A_MODEL)
    given.only("api_server", of="server", names=("server_port",))
    given.only("proxy", of="proxy", names=())
    given.only("api_server", of="engine", names=())
    if url is not None and "server_port" in given.server:
        raise ConfigError("server_port and URL are both given; leave one of them out")
    options = ServeOptions(**{**from_environment("api_key"), **given.options})
    port = ServerConfig(**given.server).server_port
    return _talk(url or f"http://127.0.0.1:{port}", options, GenerationConfig(**given.generation))


def _gradio(what: str | None, given: Given) -> int:
    from jaxdeploy.api.client import is_url

    given.without("api_server", *OF_AN_API)
    given.without("api_client", "adapter_name")
    given.only("proxy", of="proxy", names=())
    if is_url(what or ""):
        given.without("a MODEL; give it to the server at URL", *OF_A_MODEL)
        given.only("a MODEL; give it to the server at URL", of="engine", names=())
        options = ServeOptions(**{**from_environment("api_key"), **given.options})
    elif "api_key" in given.options:
        raise ConfigError("api_key is for a server at URL; --api-keys has users of the page bring a key")
    else:
        options = ServeOptions(**given.options)
    bundled = {} if what else {"model_name": "jaxdeploy-demo"}
    page_config = with_keys(ServerConfig(**{"server_port": WEB_PORT, **given.server}))
    engine_config = EngineConfig(**{**bundled, **given.engine})
    return _show(what, options, page_config, engine_config, GenerationConfig(**given.generation))


def _stand_in_front(what: str | None, options: ServeOptions, server_config: ServerConfig, config: ProxyConfig) -> None:
    from jaxdeploy.server import serve_proxy

    if what is not None:
        raise ConfigError(f"argument={what!r} is one too many: a proxy has no model; name its servers with --nodes")
    serve_proxy(config, server_config, log_level=options.log_level)


def _serve(model: str | None, options: ServeOptions, config: ServerConfig, engine: EngineConfig) -> None:
    from jaxdeploy.bundled import bundled_model
    from jaxdeploy.server import serve

    serve(
        bundled_model() if model is None else model,
        engine,
        config,
        chat_template=template_config(options.chat_template, options.cap, options.meta_instruction),
        log_level=options.log_level,
        progress=sys.stderr.isatty(),
    )


def _talk(url: str, options: ServeOptions, generation: GenerationConfig) -> int:
    from jaxdeploy.api.client import ApiClient
    from jaxdeploy.api.loading import set_log_level
    from jaxdeploy.chat.input import line_reader
    from jaxdeploy.chat.session import Conversation
    from jaxdeploy.chat.terminal import Chat

    set_log_level(options.log_level)
    client = ApiClient(url, options.api_key, options.adapter_name)
    Chat(client, generation, Conversation(options.meta_instruction)).run(line_reader(), f"{client.model} at {url}")
    client.close()
    return 0


def _show(
    what: str | None, options: ServeOptions, config: ServerConfig, engine: EngineConfig, generation: GenerationConfig
) -> int:
    from jaxdeploy.bundled import bundled_model

    try:
        from jaxdeploy.web_chat.dialogue import Manner
        from jaxdeploy.web_chat.run import web_chat
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxdeploy"):
            raise
        message = f"the web chat needs {error.name}, which is missing; pip install 'jaxdeploy[gradio]'"
        raise ConfigError(message) from None
    web_chat(
        bundled_model() if what is None else what,
        Manner(options.meta_instruction or "", generation),
        config,
        engine_config=engine,
        api_key=options.api_key,
        chat_template=template_config(options.chat_template, options.cap),
        log_level=options.log_level,
    )
    return 0
