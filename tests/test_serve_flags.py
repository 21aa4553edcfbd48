"""Flags of ``serve``: each program uses a flag or refuses it, and addresses are taken as documents write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jaxdeploy
from jaxdeploy.api.client import base_url, is_url, sampling_fields
from jaxdeploy.cli import main, serve
from jaxdeploy.cli.serve import NEEDS, PROGRAMS, ServeOptions
from jaxdeploy.config import EngineConfig, GenerationConfig, ProxyConfig, ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import Described, describe

URL = "http://127.0.0.1:1"
CLASSES = (ServeOptions, ServerConfig, ProxyConfig, EngineConfig, GenerationConfig)
FLAGS = {
    name: described
    for cls in CLASSES
    for name, described in describe(cls).items()
    if described.about.flag and described.about.live and name != "backend"
}
VALUES: dict[str, Any] = {
    "adapters": "a=b",
    "block_size": "32",
    "api_keys_file": "keys.txt",
    "chat_template": "vicuna",
    "min_p": "0.5",
    "proxy_url": URL,
}
PLACES = {"proxy_url": ("--proxy-url", URL), "ssl": ("--ssl",), "allow_origins": ("--allow-origins", "https://x")}
"""How the settings are given that other settings need."""


def value_of(name: str, described: Described) -> list[str]:
    """The flag with a value that is not its default."""
    flag = f"--{name.replace('_', '-')}"
    if described.kind is bool:
        return [flag.replace("--", "--no-") if described.default else flag]
    if name in VALUES:
        return [flag, VALUES[name]]
    choices = [choice for choice in described.about.choices if choice not in (None, described.default)]
    if choices:
        return [flag, str(choices[-1])]
    return [flag, {int: "5", float: "0.75"}.get(described.kind, "text")]


class ReachedError(Exception):
    """A program would run; ``given`` is everything that it was given."""

    def __init__(self, *given: Any) -> None:
        self.given = given


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reach(*given: Any) -> None:
        raise ReachedError(*given)

    monkeypatch.chdir(tmp_path)
    Path("keys.txt").write_text("text\n")
    for name in ("_serve", "_stand_in_front", "_talk", "_show"):
        monkeypatch.setattr(serve, name, reach)


def values(given: Any) -> Iterator[tuple[str, Any]]:
    """Every setting that a program was given."""
    for part in given:
        if type(part) in CLASSES:
            yield from vars(part).items()


@pytest.mark.parametrize(
    ("program", "what"),
    [("api_server", "m"), ("proxy", None), ("api_client", URL), ("gradio", "m"), ("gradio", URL), ("api_client", None)],
)
def test_every_flag_is_used_or_refused(reached: None, program: str, what: str | None) -> None:
    """Used: the program gets the value, and a module beyond the command line and the settings reads it."""
    sources = [
        file.read_text(encoding="utf-8")
        for file in Path(jaxdeploy.__file__).parent.rglob("*.py")
        if not {"cli", "config"} & set(file.parts)
    ]
    command = Path(serve.__file__).read_text(encoding="utf-8")
    used = 0
    for name, described in FLAGS.items():
        argv = [program, *filter(None, [what]), *PLACES.get(NEEDS.get(name, ""), ()), *value_of(name, described)]
        try:
            serve.run(serve_parser().read(argv))
        except ConfigError as refused:
            named = {name, NEEDS.get(name, name)}
            assert any(one in str(refused) for one in named), argv  # noqa: PT017
        except ReachedError as reach:
            used += 1
            found = [value for known, value in values(reach.given) if known == name]
            url = [part for part in reach.given if isinstance(part, str)]
            arrived = any(value != described.default for value in found) or "http://127.0.0.1:5" in url
            assert arrived or name == "api_keys_file", argv
            reads = re.compile(rf"(\.|[\"'])({name})\b")
            assert any(reads.search(source) for source in [*sources, command.partition("def _stand")[2]]), name
    assert used > 3


@pytest.mark.parametrize(
    "name", [name for name, described in describe(GenerationConfig).items() if described.about.flag]
)
def test_every_flag_of_a_chat_reaches_the_server(name: str) -> None:
    described = describe(GenerationConfig)[name]
    if described.about.live:
        fields: dict[str, Any] = {name: {bool: False, int: 5, float: 0.75, str: ["x"]}[described.kind]}
        assert sampling_fields(GenerationConfig(**fields))


def serve_parser() -> Any:
    from jaxdeploy.cli import command_parser

    return command_parser("serve")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["api_server", "--api-key", "k"], "api_key is a flag of api_client"),
        (["api_server", "--adapter-name", "a"], "adapter_name is a flag of api_client"),
        (["gradio", "m", "--adapter-name", "a"], "adapter_name is a flag of api_client"),
        (["api_client", "--tp", "2"], "tp is a flag of api_server"),
        (["api_client", "--server-name", "x"], "server_name is a flag of api_server"),
        (["api_client", "--cap", "completion"], "cap is a flag of"),
        (["proxy", "--meta-instruction", "x"], "meta_instruction is a flag of chats"),
        (["proxy", "--reasoning-parser", "think"], "reasoning_parser is a flag of api_server"),
        (["api_server", "--proxy-api-key", "k"], "proxy_api_key has no effect without proxy_url"),
        (["gradio", "--ssl-keyfile", "k.pem"], "ssl_keyfile has no effect without ssl"),
        (["api_server", "--generation-config", "vllm"], "generation_config='vllm' is not there yet"),
        (["api_server", "m", "--meta-instruction", "x", "--chat-template", "x.jinja"], "meta_instruction has no place"),
    ],
)
def test_flags_of_another_program(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(["serve", *argv]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("level", ["CRITICAL", "FATAL", "WARN", "NOTSET", "DEBUG"])
def test_lmdeploys_flags_are_taken(reached: None, level: str) -> None:
    flags = ["--log-level", level, "--cap", "completion", "--meta-instruction", "Be brief.", "--cp", "1"]
    more = ["--generation-config", "auto", "--vision-max-batch-size", "1", "--disable-metrics", "--role", "Hybrid"]
    with pytest.raises(ReachedError) as api_server:
        serve.run(serve_parser().read(["api_server", "m", *flags, *more]))
    assert dict(values(api_server.value.given))["log_level"] == level
    with pytest.raises(ReachedError):
        serve.run(serve_parser().read(["api_client", "localhost:23333", "--session-id", "1", "--log-level", level]))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://0.0.0.0:23333", "http://0.0.0.0:23333"),
        ("127.0.0.1:23333", "http://127.0.0.1:23333"),
        ("localhost:23333/v1/", "http://localhost:23333"),
        ("my-host.example:80", "http://my-host.example:80"),
        ("[::1]:23333", "http://[::1]:23333"),
        ("https://x/v1", "https://x"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert is_url(text)
    assert base_url(text) == url


def test_models_are_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model:23").mkdir()
    for text in ("model:23", "./m", "Qwen/Qwen2", "m", "a:b", "C:/models"):
        assert not is_url(text)


def test_gradio_takes_an_address_without_a_scheme(reached: None) -> None:
    with pytest.raises(ConfigError, match="tp is a flag of a MODEL"):
        serve.run(serve_parser().read(["gradio", "127.0.0.1:23333", "--tp", "2"]))
    assert set(PROGRAMS) == {"api_server", "proxy", "api_client", "gradio"}
