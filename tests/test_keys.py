"""Keys of a server: where they come from, that none is empty, and what requests of different keys share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jaxdeploy.api.client import ApiClient
from jaxdeploy.cli import main
from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.errors import ConfigError
from jaxdeploy.server.keys import with_keys
from jaxdeploy.server.proxy.app import create_proxy_app
from tests.served import RunningServer, running, until

ASK: Any = [{"role": "user", "content": "What is 6 times 7? I would like to know that, please."}]


@pytest.mark.parametrize("keys", [[""], "", [], ["one", ""], [" "], ["one "], "a\nb", [1], 5])
def test_an_empty_key_is_refused_and_no_key_is_shown(keys: Any) -> None:
    with pytest.raises(ConfigError, match="api_keys: a key must be a text") as refused:
        ServerConfig(api_keys=keys)
    assert "one" not in str(refused.value)
    with pytest.raises(ConfigError, match="node_api_key"):
        ProxyConfig(node_api_key="")
    assert "secret" not in repr(ServerConfig(api_keys=["secret"], proxy_api_key="secret"))


@pytest.mark.parametrize(
    ("argv", "environment"),
    [
        (["api_server", "--api-keys", ""], {}),
        (["api_server", "--api-keys", "one", ""], {}),
        (["api_server", "--api-keys="], {}),
        (["api_server"], {"JAXDEPLOY_API_KEYS": ""}),
        (["api_server"], {"JAXDEPLOY_API_KEYS": "  "}),
        (["api_server", "--config", "keys.yaml"], {}),
        (["api_server", "--api-keys-file", "empty.txt"], {}),
        (["api_server", "--api-keys-file", "nowhere.txt"], {}),
        (["api_server", "--api-keys-file", "empty.txt", "--api-keys", "one"], {}),
        (["api_server", "--proxy-url", "http://127.0.0.1:1", "--proxy-api-key", ""], {}),
        (["proxy", "--api-keys", ""], {}),
        (["proxy"], {"JAXDEPLOY_API_KEYS": ""}),
        (["proxy", "--node-api-key", ""], {}),
        (["proxy"], {"JAXDEPLOY_NODE_API_KEY": ""}),
        (["api_client", "http://127.0.0.1:1", "--api-key", ""], {}),
        (["api_client", "http://127.0.0.1:1"], {"JAXDEPLOY_API_KEY": ""}),
        (["gradio", "--api-keys", ""], {}),
        (["gradio"], {"JAXDEPLOY_API_KEYS": ""}),
        (["gradio", "http://127.0.0.1:1", "--api-key", ""], {}),
    ],
)
def test_no_program_starts_with_an_empty_key(
    argv: list[str],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys.yaml").write_text("api_keys:\n")
    Path("empty.txt").write_text("# none yet\n\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", *argv]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "key" in line.lower()


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the clients\n one \n\ntwo\n")
    assert with_keys(ServerConfig(api_keys_file=str(file))).api_keys == ["one", "two"]
    monkeypatch.setenv("JAXDEPLOY_API_KEYS", "three four")
    assert with_keys(ServerConfig()).api_keys == ["three", "four"]
    assert with_keys(ServerConfig(api_keys=["five"])).api_keys == ["five"]
    assert with_keys(ServerConfig(api_keys_file=str(file))).api_keys == ["one", "two"]
    assert create_proxy_app(ProxyConfig(), ServerConfig()).user_middleware
    with pytest.raises(ConfigError, match="api_key is empty"):
        ApiClient("http://127.0.0.1:1", "")


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"\xef\xbb\xbfone\r\n\r\ntwo\r\n", ["one", "two"]),
        ("ключ\n".encode(), ["ключ"]),
        (b"x" * 10_000, ["x" * 10_000]),
        ("one".encode("utf-16"), None),
        (b"one\0\n", None),
        (b"\n" * 2**21, None),
    ],
)
def test_odd_files_of_keys(tmp_path: Path, content: bytes, keys: list[str] | None) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    if keys is not None:
        assert with_keys(ServerConfig(api_keys_file=str(file))).api_keys == keys
        return
    with pytest.raises(ConfigError, match="api_keys"):
        with_keys(ServerConfig(api_keys_file=str(file)))


@pytest.mark.parametrize("name", ["/dev/zero", "x" * 300, "a\0b", "\ud83d", "/"])
def test_odd_names_of_files_of_keys(name: str) -> None:
    with pytest.raises(ConfigError, match=r"api_keys_file=.*; name a"):
        with_keys(ServerConfig(api_keys_file=name))


class Client:
    """Somebody with a key."""

    def __init__(self, server: RunningServer, key: str) -> None:
        self._http = httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self._http.post(path, json=body)

    def get(self, path: str) -> httpx2.Response:
        return self._http.get(path)

    def chat(self, **body: Any) -> Any:
        return self.post("/v1/chat/completions", messages=ASK, max_tokens=2, temperature=0, **body).json()

    def cached(self) -> int:
        """Tokens of the prompt that the server says it knew."""
        return int(self.chat()["usage"]["prompt_tokens_details"]["cached_tokens"])

    def say(self, text: str, **options: Any) -> Any:
        asked = {"prompt": text, "session_id": 3, "interactive_mode": True, "request_output_len": 4, **options}
        return self.post("/v1/chat/interactive", **asked).json()

    def stream(self) -> Any:
        asked = {"messages": ASK, "max_tokens": 150, "ignore_eos": True, "stream": True}
        return self._http.stream("POST", "/v1/chat/completions", json=asked)

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def keyed(engine: AsyncEngine, request: pytest.FixtureRequest) -> Iterator[tuple[Client, Client]]:
    """Yield two clients of one server with different keys."""
    with running(engine, api_keys=["one", "two"], separate_keys=request.param) as server:
        clients = Client(server, "one"), Client(server, "two")
        yield clients
        for client in clients:
            client.close()
        assert until(server.idle)


WRONG: list[list[tuple[bytes, bytes]]] = [
    [],
    [(b"Authorization", b"Bearer")],
    [(b"Authorization", b"Basic SECRET")],
    [(b"Authorization", b"Bearer " + b"SECRET" * 1500)],
    [(b"Authorization", "Bearer SECRETé\U0001f600".encode())],
    [(b"Authorization", b"Bearer SECRET\xff")],
    [(b"Authorization", b"Bearer SECRET"), (b"x-api-key", b"one")],
    [(b"x-api-key", b"\xf0\x9f\x98\x80SECRET")],
]


@pytest.mark.parametrize("keyed", [True], indirect=True)
def test_every_route_refuses_every_wrong_key(keyed: tuple[Client, Client], caplog: pytest.LogCaptureFixture) -> None:
    url = str(keyed[0]._http.base_url)
    paths = keyed[0].get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods if path != "/health"]
    assert len(routes) > 20
    with httpx2.Client(base_url=url) as http:
        for (method, path), headers in itertools.product(routes, WRONG):
            refused = http.request(method, path.replace("{", "").replace("}", ""), headers=headers, json={})
            assert (refused.status_code, "SECRET" in refused.text) == (401, False), (method, path, headers)
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("keyed", [True], indirect=True)
def test_keys_are_separate(keyed: tuple[Client, Client]) -> None:
    one, two = keyed
    one.cached()
    assert one.cached() > 0
    assert two.cached() == 0, "it does not learn what the other has asked"
    assert two.cached() > 0

    one.say("Hello")
    assert two.say("Hello")["history_tokens"] == 0
    assert two.say("", cancel=True)["finish_reason"] == "stop"
    two.say("", interactive_mode=False, request_output_len=0)
    assert one.say("And?")["history_tokens"] > 0

    kept = one.post("/v1/responses", input="Hi", max_output_tokens=2).json()["id"]
    assert two.get(f"/v1/responses/{kept}").status_code == 404
    assert two.post("/v1/responses", input="Hi", previous_response_id=kept).status_code == 404
    assert two._http.delete(f"/v1/responses/{kept}").status_code == 404
    assert one.get(f"/v1/responses/{kept}").status_code == 200

    with one.stream() as stream:
        lines = stream.iter_lines()
        first = next(lines)
        name = first.partition('"id":"')[2].partition('"')[0]
        assert two.post("/abort_request", abort_all=True).json() == {"aborted": 0}
        assert two.post("/abort_request", request_id=name).json() == {"aborted": 0}
        assert one.post("/abort_request", abort_all=True).json() == {"aborted": 1}
        assert "was aborted" in "".join(lines)

    refused = one.chat(priority=-1)["error"]
    assert refused["type"] == "permission_error"
    assert "--no-separate-keys" in refused["message"]
    assert one.chat(priority=1)["choices"]


@pytest.mark.parametrize("keyed", [False], indirect=True)
def test_keys_of_one_party_share(keyed: tuple[Client, Client]) -> None:
    one, two = keyed
    one.cached()
    assert two.cached() > 0
    kept = one.post("/v1/responses", input="Hi", max_output_tokens=2).json()["id"]
    assert two.get(f"/v1/responses/{kept}").status_code == 200
    assert one.chat(priority=-1)["choices"]
