"""Settings of the HTTP server."""

from __future__ import annotations

from jaxdeploy.config.fields import positive
from jaxdeploy.settings import Rule, secret, setting, settings


@settings
class ServerConfig:
    """How the HTTP server listens, whom it lets in, and how much it takes.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    server_name: str = setting("0.0.0.0", "address to listen on; 127.0.0.1: this machine alone")
    server_port: int = setting(
        23333,
        "port to listen on; a proxy's default is 8000",
        rule=Rule("must lie between 0 and 65535", lambda value: 0 <= value < 65536),
    )
    api_keys: list[str] | None = secret(
        "keys of which every request must bring one; default: those of the environment's JAXDEPLOY_API_KEYS, with "
        "spaces between them, else none is needed"
    )
    api_keys_file: str | None = setting(None, "file with a key on each line, in place of api_keys")
    separate_keys: bool = setting(
        True,
        "where there are several keys, requests share cached prompts, sessions and stored responses only with those of "
        "the same key, end only those, and have no priority over others",
    )
    ssl: bool = setting(False, "speak HTTPS")
    ssl_certfile: str | None = setting(None, "certificate chain (PEM); default: the environment's SSL_CERTFILE")
    ssl_keyfile: str | None = setting(None, "its private key (PEM); default: the environment's SSL_KEYFILE")
    allow_origins: list[str] | None = setting(
        None, "web pages of these origins may ask (CORS), * all; default: none but the server's own"
    )
    allow_credentials: bool = setting(False, "CORS: requests may bring cookies")
    allow_methods: list[str] | None = setting(None, "CORS: methods; default: all")
    allow_headers: list[str] | None = setting(None, "CORS: headers; default: all")
    tool_call_parser: str | None = setting(
        None, "how the model writes calls: hermes, llama3, internlm2 or mistral; default: as its chat template tells"
    )
    reasoning_parser: str | None = setting(
        None, "how the model writes thoughts: think; default: as its chat template tells"
    )
    max_concurrent_requests: int = positive(
        "replies that are generated or wait; what is more is turned away with 429", 1024, "give a number of replies"
    )
    max_body_size: int = positive("largest body of a request, in bytes", 32 * 1024**2, "give a number of bytes")
    disable_fastapi_docs: bool = setting(False, "have no /docs and /openapi.json")
    log_format: str = setting("text", "how a line of the log reads", choices=("text", "json"))
    proxy_url: str | None = setting(None, "proxy to register this server with, as long as it runs")
    proxy_api_key: str | None = secret(
        "one of this proxy's --operator-keys; it is told the first of --api-keys; default: JAXDEPLOY_PROXY_API_KEY"
    )
    node_url: str | None = setting(
        None, "address at which the proxy reaches this server; default: that of the network towards it"
    )
