"""LoRA adapters behind the server: named as models in every API, loaded and unloaded while replies go on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from jaxdeploy.api.loading import pipeline
from jaxdeploy.api.pipeline import Pipeline
from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig, ProxyConfig, ServerConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.errors import ConfigError, RequestError, UnknownAdapterError
from jaxdeploy.messages import FinishReason, Request, TextOutput
from jaxdeploy.models.registry import read_config
from jaxdeploy.server.adapters import ServedAdapters
from jaxdeploy.server.proxy.app import create_proxy_app
from jaxdeploy.server.run import load
from tests.served import NAME, RunningApp, RunningServer, demo_config, demo_engine, running, until
from tests.tiny_adapters import TinyAdapter

KEY = "of the operator"
QUESTION: Any = [{"role": "user", "content": "What is 6 times 7?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
BASE = read_config(read_hf_config(Path(bundled_model())))
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def write(folder: Path, seed: int, **fields: Any) -> str:
    """One that changes what a model says which is sure of itself."""
    return str(TinyAdapter(**{"seed": seed, "base": BASE, **fields}).write(folder, config={"lora_alpha": 24}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = tmp_path_factory.mktemp("adapters")
    return {name: write(made / name, seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture(scope="module")
def settings(folders: dict[str, str]) -> dict[str, Any]:
    """More adapters than slots of the device."""
    return {"adapters": {name: folders[name] for name in ("one", "two")}, "max_loras": 1, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any]) -> Iterator[AsyncEngine]:
    made = demo_engine(**settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pipe(settings: dict[str, Any]) -> Iterator[Pipeline]:
    with pipeline(bundled_model(), backend_config=demo_config(**settings)) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(engine: AsyncEngine, settings: dict[str, Any]) -> Iterator[RunningServer]:
    with running(engine, options={"adapters": settings["adapters"]}, api_keys=[KEY]) as made:
        yield made


@pytest.fixture
def http(guarded: RunningServer) -> Iterator[httpx2.Client]:
    """A client whose test leaves the server as it was."""
    with httpx2.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as made:
        yield made
        assert names(made) == [NAME, "one", "two"]
    assert until(guarded.idle), "a test left something behind"


@pytest.fixture
def client(guarded: RunningServer, http: httpx2.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def names(http: httpx2.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/models").json()["data"]]


def chat(http: httpx2.Client, model: str, **options: Any) -> httpx2.Response:
    return http.post("/v1/chat/completions", json={"model": model, "messages": QUESTION, **GREEDY, **options})


def said(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def refused(response: httpx2.Response, status: int) -> str:
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    return message


@contextmanager
def loaded(http: httpx2.Client, name: str, folder: str) -> Iterator[None]:
    response = http.post(LOAD, json={"lora_name": name, "lora_path": folder})
    assert (response.status_code, response.json()) == (200, {"loaded": name})
    yield
    http.post(UNLOAD, json={"lora_name": name})


def test_replies_are_those_of_the_python_api(http: httpx2.Client, pipe: Pipeline) -> None:
    replies = [said(chat(http, name)) for name in (NAME, "one", "two")]
    assert len({*replies}) == 3
    found = pipe([QUESTION] * 3, adapter_name=[None, "one", "two"], do_sample=False, max_new_tokens=12)
    assert isinstance(found, list)
    assert replies == [response.text for response in found]
    alone = pipe.chat("What is 6 times 7?", adapter_name="one", do_sample=False, max_new_tokens=12)
    assert alone.response.text == replies[1]  # type: ignore[union-attr]


def test_the_python_api_loads_and_unloads(pipe: Pipeline, folders: dict[str, str]) -> None:
    def reply(name: str) -> Any:
        return pipe("Hi!", adapter_name=name, do_sample=False, max_new_tokens=5)

    assert list(pipe.adapters) == ["one", "two"]
    with pytest.raises(UnknownAdapterError, match="adapter='three' is not loaded; choose one of one, two"):
        reply("three")
    pieces = pipe.stream_infer("Hi!", adapter_name="one", do_sample=False, max_new_tokens=5)
    text = next(pieces).text
    pipe.load_adapter("three", folders["three"])
    assert list(pipe.adapters) == ["one", "two", "three"]
    assert reply("three").text != reply("one").text
    pipe.unload_adapter("three")
    with pytest.raises(UnknownAdapterError):
        pipe.unload_adapter("three")
    assert text + "".join(piece.text for piece in pieces) == reply("one").text
    assert pipe.embed(["Hi!"], adapter_name="one") != pipe.embed(["Hi!"])


def test_what_is_served_is_listed(client: openai.OpenAI, guarded: RunningServer, folders: dict[str, str]) -> None:
    base, one, _ = [card.model_dump() for card in client.models.list().data]
    assert (base["root"], base["parent"]) == (NAME, None)
    assert (one["id"], one["root"], one["parent"]) == ("one", folders["one"], NAME)
    assert client.models.retrieve("one").model_dump() == one
    with anthropic.Anthropic(base_url=f"{guarded.url}/anthropic", api_key=KEY, max_retries=0) as other:
        assert [card.id for card in other.models.list().data] == [NAME, "one", "two"]


def test_every_api_takes_an_adapter_for_a_model(http: httpx2.Client) -> None:
    def reply(path: str, model: str, **body: Any) -> Any:
        response = http.post(path, json={"model": model, **body})
        assert response.status_code == 200, response.text
        return response.json()

    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Once upon", **GREEDY},
        "/v1/embeddings": {"input": "Once upon"},
        "/v1/responses": {"input": "Hi!", "temperature": 0, "max_output_tokens": 6},
        "/v1/messages": {"messages": QUESTION, **GREEDY},
    }
    contents = {
        "/v1/completions": "choices",
        "/v1/embeddings": "data",
        "/v1/responses": "output",
        "/v1/messages": "content",
    }
    for path, body in asked.items():
        base, one = (reply(path, name, **body) for name in (NAME, "one"))
        assert (base["model"], one["model"]) == (NAME, "one")
        plain = [json.dumps(_without_ids(one_of[contents[path]])) for one_of in (base, one)]
        assert plain[0] != plain[1], path
    for path, length in (("/generate", "max_tokens"), ("/v1/chat/interactive", "request_output_len")):
        body = {"prompt": "Hi!", "top_k": 1, length: 6}
        texts = [
            http.post(path, json={**body, **named}).json()["text"]
            for named in ({}, {"model": "one"}, {"adapter_name": "one"})
        ]
        assert texts[0] != texts[1] == texts[2]
    count = reply("/v1/messages/count_tokens", "one", messages=QUESTION)
    assert count == reply("/v1/messages/count_tokens", NAME, messages=QUESTION)


def _without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


def test_streams_name_the_adapter(client: openai.OpenAI, http: httpx2.Client) -> None:
    chunks = list(client.chat.completions.create(model="one", messages=QUESTION, stream=True, extra_body=GREEDY))
    assert {chunk.model for chunk in chunks} == {"one"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said(chat(http, "one"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": QUESTION}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 5}),
        ("/v1/chat/interactive", {"prompt": "a"}),
        ("/generate", {"prompt": "a"}),
    ],
)
def test_an_unknown_one_is_a_404(http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(path, json={"model": "three", **body})
    assert refused(response, 404) == "model='three' is not served here; ask for 'demo', 'one', 'two'"
    assert response.json()["error"]["code"] == "model_not_found"


def test_loading_while_a_reply_streams(client: openai.OpenAI, http: httpx2.Client, folders: dict[str, str]) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
    whole = said(chat(http, "one", **options))
    stream = client.chat.completions.create(model="one", messages=QUESTION, stream=True, extra_body=options)
    with stream:
        text = next(iter(stream)).choices[0].delta.content or ""
        with loaded(http, "three", folders["three"]):
            assert names(http) == [NAME, "one", "two", "three"]
            assert said(chat(http, "three")) != said(chat(http, "two"))
            text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole


def test_unloading_while_it_replies(client: openai.OpenAI, http: httpx2.Client, folders: dict[str, str]) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
    with loaded(http, "three", folders["three"]):
        whole = said(chat(http, "three", **options))
        with client.chat.completions.create(
            model="three", messages=QUESTION, stream=True, extra_body=options
        ) as stream:
            text = next(iter(stream)).choices[0].delta.content or ""
            assert http.post(UNLOAD, json={"lora_name": "three"}).json() == {"unloaded": "three"}
            assert "'three' is not served here" in refused(chat(http, "three"), 404)
            assert "adapter='three' is not loaded" in refused(http.post(UNLOAD, json={"lora_name": "three"}), 404)
            text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole


def test_an_adapter_that_goes_between_server_and_engine(
    http: httpx2.Client, guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(guarded.served.adapters._served, "gone", guarded.served.adapters["one"])
    response = chat(http, "gone")
    assert refused(response, 404) == "adapter='gone' is not loaded; choose one of one, two"
    assert response.json()["error"]["code"] == "model_not_found"
    monkeypatch.undo()


def test_an_adapter_that_goes_between_engine_and_its_process(
    http: httpx2.Client, guarded: RunningServer, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = guarded.served.adapters._served
    served["gone"] = served["one"]

    async def refuse(requests: Sequence[Request]) -> AsyncGenerator[TextOutput]:
        del served["gone"]
        yield TextOutput(requests[0].request_id, "", (), (), FinishReason.ERROR)

    monkeypatch.setattr(engine, "generate_all", refuse)
    assert "model='gone' is not served here" in refused(chat(http, "gone"), 404)


@pytest.mark.parametrize(("error", "left"), [(EngineDiedError("exit code -9"), ["a"]), (UnknownAdapterError("a"), [])])
def test_an_adapter_that_could_not_be_unloaded_is_still_served(error: Exception, left: list[str]) -> None:
    async def unload_adapter(name: str) -> None:
        raise error

    engine: Any = SimpleNamespace(unload_adapter=unload_adapter)
    served = ServedAdapters(engine, NAME, {"a": "folder"})
    with pytest.raises(type(error)):
        asyncio.run(served.unload("a"))
    assert list(served) == left


def test_names_that_are_taken(http: httpx2.Client, folders: dict[str, str]) -> None:
    body = {"lora_name": "three", "lora_path": folders["three"]}
    with loaded(http, "three", folders["three"]):
        before = said(chat(http, "three"))
        assert "lora_name='three' is loaded already; unload it first, or send" in refused(
            http.post(LOAD, json=body), 400
        )
        again = http.post(LOAD, json={**body, "lora_path": folders["one"], "load_inplace": True})
        assert again.json() == {"loaded": "three"}
        assert said(chat(http, "three")) == said(chat(http, "one")) != before
    assert "lora_name='demo' is the name of the model" in refused(
        http.post(LOAD, json={**body, "lora_name": NAME}), 400
    )
    assert "lora_name='' is wrong" in refused(http.post(LOAD, json={**body, "lora_name": ""}), 400)


def test_what_does_not_fit_is_listed(http: httpx2.Client, tmp_path: Path, folders: dict[str, str]) -> None:
    def fault(folder: Path | str) -> str:
        message = refused(http.post(LOAD, json={"lora_name": "bad", "lora_path": str(folder)}), 400)
        assert "bad" in message
        return message

    assert "does not exist" in fault(tmp_path / "nowhere")
    assert "does not exist" in fault("a\0b")
    other_base = fault(TinyAdapter(targets=("q_proj",), layers=(0, 1)).write(tmp_path / "base"))
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        assert f"{module}: lora_A has shape [4, 32], [4, 256] expected" in other_base
        assert f"{module}: lora_B has shape [64, 4], [256, 4] expected" in other_base
    assert "rank 9 is more than max_lora_rank=8" in fault(write(tmp_path / "rank", 0, rank=9))
    corrupt = shutil.copytree(folders["one"], tmp_path / "corrupt")
    weights = corrupt / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "adapter_model.safetensors" in fault(corrupt)


def test_loading_needs_a_key(engine: AsyncEngine, guarded: RunningServer, folders: dict[str, str]) -> None:
    body = {"lora_name": "three", "lora_path": folders["three"]}
    assert httpx2.post(guarded.url + LOAD, json=body).status_code == 401
    with running(engine) as open_to_all:
        for path in (LOAD, UNLOAD):
            response = httpx2.post(open_to_all.url + path, json=body)
            assert "start the server with --api-keys KEY" in refused(response, 403)
            assert response.json()["error"]["type"] == "permission_error"


def test_an_engine_without_room() -> None:
    engine = demo_engine()
    with running(engine, api_keys=[KEY]) as server:
        body = {"lora_name": "x", "lora_path": "/nowhere"}
        response = httpx2.post(server.url + LOAD, json=body, headers={"x-api-key": KEY})
        assert "there is no room; start with max_loras=8" in refused(response, 400)
    engine.close()


def test_an_adapter_must_not_have_the_models_name() -> None:
    config = EngineConfig(model_name="a", adapters={"a": "/x"})
    with pytest.raises(ConfigError, match="adapters='a' is the name of the model; choose another"):
        load("nowhere", config, ServerConfig())


def test_through_a_proxy(http: httpx2.Client, guarded: RunningServer, folders: dict[str, str]) -> None:
    """It asks for adapters where they are, and soon knows which come and go."""
    config = ProxyConfig(nodes=[guarded.url], node_api_key=KEY, heartbeat_interval=0.05)
    app = RunningApp(create_proxy_app(config, ServerConfig()), lifespan="on")
    with httpx2.Client(base_url=app.url, timeout=60) as proxy:
        assert names(proxy) == [NAME, "one", "two"]
        assert [card["id"] for card in proxy.get("/anthropic/v1/models").json()["data"]] == [NAME, "one", "two"]
        assert said(chat(proxy, "one")) == said(chat(http, "one"))
        generated = proxy.post("/generate", json={"prompt": "a", "adapter_name": "three"})
        assert "'three' is not served here" in refused(generated, 404)
        with loaded(http, "three", folders["three"]):
            assert until(lambda: "three" in names(proxy))
            assert said(chat(proxy, "three")) == said(chat(http, "three"))
        assert until(lambda: "three" not in names(proxy))
        assert "'three' is not served here" in refused(chat(proxy, "three"), 404)
        for path in (LOAD, UNLOAD, LOAD + "/"):
            assert "no route of the proxy" in refused(proxy.post(path, json={"lora_name": "one"}), 404)
    app.close()


def test_two_loads_of_one_name(
    guarded: RunningServer, engine: AsyncEngine, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def both() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(name: str, folder: str) -> None:
            begun.set()
            await go_on.wait()
            raise OSError(13, "Permission denied")

        monkeypatch.setattr(engine, "load_adapter", slow)
        adapters = guarded.served.adapters
        first = asyncio.create_task(adapters.load("x", "/x"))
        await begun.wait()
        with pytest.raises(RequestError, match="lora_name='x' is being loaded; wait"):
            await adapters.load("x", "/x")
        with pytest.raises(RequestError, match="lora_name='x' is being loaded; wait"):
            await adapters.unload("x")
        go_on.set()
        with pytest.raises(RequestError, match=r"lora_path='/x' cannot be read \(Permission denied\)"):
            await first

    asyncio.run(both())
