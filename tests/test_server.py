"""The server through OpenAI's own client and plain HTTP: replies, streams, errors, keys, limits, clients that leave."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import anthropic
import httpx2
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from jaxdeploy.api.client import ApiClient, ServerError
from jaxdeploy.chat.session import Conversation
from jaxdeploy.chat.terminal import Chat
from jaxdeploy.config import GenerationConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine, EngineStoppedError
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.messages import FinishReason, TextOutput
from jaxdeploy.server.error_handlers import MAX_MESSAGE_LENGTH
from tests.served import MAX_REPLIES, NAME, SESSION_LEN, RunningServer, running, until, with_tools

ASK: Any = [{"role": "user", "content": "What is 6 times 7?"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"model": NAME, "max_tokens": 200, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(server: RunningServer, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(server.url + path, json=body, timeout=60)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"messages": ASK, **GREEDY, **options})


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.models.retrieve("gpt")


def test_a_reply_is_the_same_whole_streamed_and_from_the_engine(client: openai.OpenAI, server: RunningServer) -> None:
    whole = chat(client)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    assert "42" in whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the prompt was asked before"


def test_usage_comes_only_where_it_was_asked_for(client: openai.OpenAI) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in chat(client, stream=True))


def test_alternatives(client: openai.OpenAI) -> None:
    greeting = [{"role": "user", "content": "Hello!"}]
    options = {"messages": greeting, "n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 8}
    reply = chat(client, **options)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) > 1, "they differ in their seeds"
    streamed = ["", "", ""]
    for chunk in chat(client, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts, "the seed makes them repeatable"


def test_a_reply_that_comes_last_is_continued_on_every_route(client: openai.OpenAI, server: RunningServer) -> None:
    def tokens(**fields: Any) -> Any:
        return post(server, "/tokenize", messages=begun, **fields).json()["tokens"]

    whole = chat(client).choices[0].message.content
    begun = [*ASK, {"role": "assistant", "content": whole[:4]}]
    rest = whole[4:]
    assert chat(client, messages=begun).choices[0].message.content == rest
    assert chat(client, messages=begun, extra_body={"continue_final_message": True}).choices[0].message.content == rest
    item = post(server, "/v1/responses", model=NAME, input=begun, temperature=0, max_output_tokens=12).json()
    assert item["output"][0]["content"][0]["text"] == rest
    stored = server.served.responses.find(item["id"]).items
    assert [len(getattr(stored[1], "content", ())), len(stored)] == [2, 2], (
        "it is one message with what it went on from"
    )
    block = post(server, "/v1/messages", model=NAME, messages=begun, temperature=0, max_tokens=12).json()
    assert block["content"][0]["text"] == rest
    turn = {"prompt": begun, "session_id": 77, "interactive_mode": True, "top_k": 1, "request_output_len": 12}
    assert post(server, "/v1/chat/interactive", **turn).json()["text"] == rest
    with server.served.sessions.turn(("", 77), "a test") as conversation:
        assert [message["content"] for message in conversation.messages] == [ASK[0]["content"], whole]
    server.served.sessions.forget(("", 77))

    anew = tokens(add_generation_prompt=True)
    assert tokens() == tokens(continue_final_message=True) == anew[: len(tokens())]
    assert tokens(continue_final_message=False) == anew
    assert len(tokens()) < len(tokens(add_generation_prompt=False)) < len(anew)
    both = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(openai.BadRequestError, match=r"add_generation_prompt=true .* continue_final_message=true"):
        chat(client, messages=begun, extra_body=both)
    with pytest.raises(openai.BadRequestError, match="continue_final_message=true needs a last message of role"):
        chat(client, extra_body={"continue_final_message": True})


def test_stop_words_and_length(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    word = whole[3:6]
    cut = chat(client, stop=[word]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(word)], "stop")
    assert chat(client, max_tokens=2).choices[0].finish_reason == "length"
    assert chat(client, max_tokens=openai.omit, max_completion_tokens=2).usage.completion_tokens == 2


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in tokens), "it is greedy"
    assert b"".join(bytes(token.bytes) for token in tokens).decode().startswith(choice.message.content.strip()[:8])
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 3}, "temperature=3 is wrong: input should be less than or equal to 2"),
        ({"temprature": 1}, "temprature is no field"),
        ({"messages": []}, "messages=\\[\\] is wrong"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role='robot' is wrong"),
        ({"messages": [{"role": "user"}]}, "content=null says nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}, r"x \.\.\. x+' found using 'type'"),
        ({"tool_choice": {"type": "function", "function": {"name": "x" * 9999}}}, "names no function of tools"),
        ({"store": True}, "store=True is not there; replies are not kept"),
        ({"logit_bias": {"five": 1}}, "logit_bias.*valid integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: token 99999 must be between 0 and"),
        ({"top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "stream_options are for streams only"),
        ({"n": MAX_REPLIES + 1}, f"n={MAX_REPLIES + 1} replies in one request are more than {MAX_REPLIES}"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs=5"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages has a field of its own"),
        ({"chat_template_kwargs": {"tone": 1}}, "chat_template_kwargs.tone is not read by chat template"),
        ({"enable_thinking": True}, "chat_template_kwargs.enable_thinking is not read by chat template"),
    ],
)
def test_wrong_requests_say_what_is_wrong(server: RunningServer, options: dict[str, Any], says: str) -> None:
    response = post(server, "/v1/chat/completions", **{"messages": ASK, **GREEDY, **options})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert re.search(says, error["message"]), error["message"]
    assert len(error["message"]) <= MAX_MESSAGE_LENGTH
    assert "Traceback" not in response.text
    assert "/work" not in response.text


def test_every_chat_route_names_variables_that_the_template_does_not_read(server: RunningServer) -> None:
    routes = {
        "/v1/messages": {"messages": ASK, "max_tokens": 1},
        "/v1/messages/count_tokens": {"messages": ASK},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
        "/tokenize": {"messages": ASK},
    }
    for path, body in routes.items():
        wrong = post(server, path, model=NAME, **body, chat_template_kwargs={"tone": 1})
        assert (wrong.status_code, "chat_template_kwargs.tone is not read" in wrong.text) == (400, True), path
        assert post(server, path, model=NAME, **body, chat_template_kwargs={"enable_thinking": False}).is_success, path


def test_other_errors_have_the_form_of_openai(client: openai.OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="gpt-4")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=f"session_len={SESSION_LEN}") as long:
        chat(client, messages=[{"role": "user", "content": "word " * SESSION_LEN}], stream=True)
    assert long.value.code == "context_length_exceeded"
    for content, headers, says in (
        ("{", {"Content-Type": "application/json"}, "body is not JSON ("),
        ("{", {}, "body is not JSON by its type"),
        ('{"n": %s}' % ("9" * 5000), {"Content-Type": "application/json"}, "body cannot be read (Exceeds the limit"),
    ):
        refused = httpx2.post(f"{server.url}/v1/completions", content=content, headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(says)
    assert httpx2.get(f"{server.url}/nowhere").json()["error"]["type"] == "invalid_request_error"
    wrong_method = httpx2.get(f"{server.url}/v1/completions")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("error", [EngineStoppedError("the engine has stopped; restart it"), OSError("/secret/path")])
def test_failures_of_the_server_have_the_form_of_openai(
    client: openai.OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fails(requests: object) -> AsyncGenerator[TextOutput]:
        for _ in "once":
            raise error
        yield TextOutput("", "", ())

    monkeypatch.setattr(server.served.engine, "generate_all", fails)
    with pytest.raises(openai.InternalServerError) as failed:
        chat(client)
    assert failed.value.status_code == (503 if isinstance(error, EngineStoppedError) else 500)
    assert "/secret" not in str(failed.value)
    with pytest.raises(openai.APIError), chat(client, stream=True) as stream:
        list(stream)


def test_completions(client: openai.OpenAI, server: RunningServer) -> None:
    text = "The cat sat on"
    single = client.completions.create(prompt=text, **GREEDY)
    ids = post(server, "/tokenize", prompt=text).json()["tokens"]
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == single.choices[0].text
    many = client.completions.create(prompt=[text, "Once upon"], n=2, echo=True, **GREEDY)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices[:2]] == [text + single.choices[0].text] * 2
    assert many.choices[2].text.startswith("Once upon")

    streamed = [""] * 4
    for chunk in client.completions.create(prompt=[text, "Once upon"], n=2, echo=True, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in many.choices]


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    choice = client.completions.create(prompt="The cat", logprobs=2, **GREEDY).choices[0]
    found = choice.logprobs
    assert found is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.text_offset[:2] == [0, len(found.tokens[0])]


def test_an_echo_alone(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=NAME, prompt="The cat", echo=True, max_tokens=0).choices[0]
    assert (choice.text, choice.finish_reason) == ("The cat", "length")


@pytest.mark.parametrize("longest", [0, 4])
def test_an_echo_has_the_log_probabilities_of_the_prompt(client: openai.OpenAI, longest: int) -> None:
    """Those that the same tokens have when the model says them."""
    said = client.completions.create(prompt="The cat", logprobs=2, **{**GREEDY, "max_tokens": 6}).choices[0]
    assert said.logprobs is not None
    options: Any = {**GREEDY, "max_tokens": longest, "logprobs": 2, "echo": True}
    options["extra_body"] = {"ignore_eos": True, "skip_special_tokens": False}
    echo = client.completions.create(prompt=["The cat" + said.text, "A"], **options).choices[0]
    found = echo.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert said.logprobs.token_logprobs is not None
    prompt = len(found.tokens) - longest
    assert "".join(found.tokens).removeprefix("<s>") == echo.text
    assert found.token_logprobs[0] is None
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] is None
    assert found.tokens[0] == "<s>", "it is not shown, so it takes no room in the text"
    assert found.text_offset == [sum(map(len, found.tokens[1:index])) for index in range(len(found.tokens))]
    again = found.token_logprobs[prompt - 6 : prompt]
    assert again == pytest.approx(said.logprobs.token_logprobs, abs=1e-4)

    tokens: list[str] = []
    text = ""
    for chunk in client.completions.create(prompt="The cat" + said.text, stream=True, **options):
        text += chunk.choices[0].text
        tokens += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.tokens) or []
    assert (text, tokens) == (echo.text, found.tokens)


def test_embeddings(client: openai.OpenAI, server: RunningServer) -> None:
    texts = ["The cat sat on the mat.", "A cat sat on a mat.", "What is 6 times 7?"]
    reply = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
    vectors = [np.array(one.embedding) for one in reply.data]
    assert [one.index for one in reply.data] == [0, 1, 2]
    assert [float(np.linalg.norm(vector)) for vector in vectors] == pytest.approx([1.0] * 3)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2], "those that say the same lie closer"
    ids = post(server, "/tokenize", prompt=texts[0]).json()["tokens"]
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens)[0] >= len(ids)
    as_base64 = client.embeddings.create(model=NAME, input=ids)  # the client asks for base64, and decodes it
    np.testing.assert_allclose(as_base64.data[0].embedding, vectors[0], atol=1e-6)
    short = client.embeddings.create(model=NAME, input=texts[0], dimensions=8, encoding_format="float").data[0]
    np.testing.assert_allclose(short.embedding, vectors[0][:8] / np.linalg.norm(vectors[0][:8]), atol=1e-5)
    mean = client.embeddings.create(model=NAME, input=texts[0], extra_body={"pooling": "mean"}).data[0]
    assert not np.allclose(mean.embedding, vectors[0])
    with pytest.raises(openai.BadRequestError, match="dimensions=100000 must be between 1 and"):
        client.embeddings.create(model=NAME, input="x", dimensions=100000)
    with pytest.raises(openai.BadRequestError, match="session_len") as long:
        client.embeddings.create(model=NAME, input="word " * SESSION_LEN)
    assert long.value.code == "context_length_exceeded"


def test_a_bias(client: openai.OpenAI, server: RunningServer) -> None:
    token = post(server, "/tokenize", prompt="7", add_special_tokens=False).json()["tokens"][-1]
    assert set(chat(client, logit_bias={str(token): 100}).choices[0].message.content.split()) == {"7" * 12}


def test_tokens_from_texts_and_back(server: RunningServer) -> None:
    found = post(server, "/tokenize", prompt="Hello there", add_special_tokens=False, return_token_strs=True).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert post(server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": "Hello there"}
    chat_ids = post(server, "/tokenize", messages=ASK).json()["tokens"]
    encoded = post(server, "/v1/encode", input=ASK[0]["content"], do_preprocess=True).json()
    assert encoded == {"input_ids": chat_ids, "length": len(chat_ids)}
    assert post(server, "/v1/encode", input=["a", "b c"]).json()["length"][0] >= 1
    assert httpx2.get(f"{server.url}/tokenizer_info").json()["max_model_len"] == SESSION_LEN


def test_health_and_metrics(client: openai.OpenAI, server: RunningServer) -> None:
    chat(client)
    assert httpx2.get(f"{server.url}/health").json() == {"status": "healthy"}
    lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    label = f'{{model_name="{NAME}"}}'
    assert values[f"jaxdeploy:generation_tokens_total{label}"] > 0
    assert values[f"jaxdeploy:num_requests_running{label}"] == 0
    assert values[f"jaxdeploy:time_to_first_token_seconds_count{label}"] > 0
    assert 0 < values[f"jaxdeploy:prefix_cache_hit_rate{label}"] < 1
    assert values[f'jaxdeploy:request_success_total{{finished_reason="stop",model_name="{NAME}"}}'] > 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: RunningServer, stream: bool) -> None:
    body = json.dumps({"messages": ASK, "max_tokens": 200, "ignore_eos": True, "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        assert until(lambda: not server.idle())
        if stream:
            assert b"200 OK" in connection.recv(4096)
    assert until(server.idle, 5)


def test_too_many_are_turned_away(client: openai.OpenAI, engine: AsyncEngine) -> None:
    with running(engine, most=1) as small, small_client(small) as other:
        stream = chat(other, stream=True, **LONG)
        next(iter(stream))
        assert until(lambda: small.served.num_replies == 1)
        with pytest.raises(openai.RateLimitError, match="1 replies are generated or wait") as turned_away:
            chat(other)
        assert int(turned_away.value.response.headers["retry-after"]) >= 1
        stream.close()
        assert until(small.idle)
        assert chat(other).choices


def test_a_request_is_ended_by_another(client: openai.OpenAI, server: RunningServer) -> None:
    stream = iter(chat(client, stream=True, **LONG))
    first = next(stream)
    assert until(lambda: server.served.num_replies == 1)
    assert post(server, "/abort_request", request_id=first.id).json() == {"aborted": 1}
    with pytest.raises(openai.APIError, match="was aborted"):
        list(stream)
    assert post(server, "/abort_request", abort_all=True).json() == {"aborted": 0}
    assert post(server, "/abort_request").status_code == 400


def small_client(server: RunningServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_keys(engine: AsyncEngine) -> None:
    with running(engine, api_keys=["one", "zwei€"]) as guarded:
        for key in ("one", "zwei€".encode().decode("latin-1")):
            headers = {b"Authorization": f"Bearer {key}".encode("latin-1")}
            assert httpx2.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200
        assert httpx2.get(f"{guarded.url}/v1/models", headers={"x-api-key": "one"}).status_code == 200
        for path in ("/health", "/docs"):
            assert httpx2.get(f"{guarded.url}{path}").status_code == 200, path
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/health/", "/docs/"):
            assert httpx2.get(guarded.url + path).status_code == 401, path
        with small_client(guarded, "on") as wrong, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            wrong.models.list()


def test_bodies_have_a_limit(engine: AsyncEngine) -> None:
    with running(engine, max_body_size=2000) as small:
        assert post(small, "/tokenize", prompt="x" * 1000).status_code == 200
        assert post(small, "/tokenize", prompt="x" * 2000).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 1000

        response = httpx2.post(f"{small.url}/tokenize", content=pieces())
        assert response.status_code == 413
        assert "2000 bytes" in response.json()["error"]["message"]


def test_other_origins_are_let_in_by_name(engine: AsyncEngine, server: RunningServer) -> None:
    origin = {"Origin": "https://here.example"}
    assert "access-control-allow-origin" not in httpx2.get(f"{server.url}/health", headers=origin).headers
    with running(engine, allow_origins=["https://here.example"], api_keys=["k"]) as open_:
        allowed = httpx2.get(f"{open_.url}/health", headers=origin).headers["access-control-allow-origin"]
        assert allowed == "https://here.example"
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        assert httpx2.request("OPTIONS", f"{open_.url}/v1/models", headers=preflight).status_code == 200


def post_with_id(server: RunningServer, name: str, body: dict[str, Any]) -> httpx2.Response:
    headers = {"x-request-id": name}
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_requests_have_ids(server: RunningServer) -> None:
    given = httpx2.get(f"{server.url}/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    asked = {"messages": ASK, "ignore_eos": True, "max_tokens": 40}
    with ThreadPoolExecutor(2) as pool:
        twins = [pool.submit(post_with_id, server, "twin", asked) for _ in range(2)]
    assert [twin.result().status_code for twin in twins] == [200, 200], "an id may come twice"
    assert len({twin.result().json()["id"] for twin in twins}) == 2
    unusable = httpx2.get(f"{server.url}/health", headers={"x-request-id": "no spaces"})
    assert len(unusable.headers["x-request-id"]) == 32


def test_the_documentation_needs_no_other_host(server: RunningServer) -> None:
    page = httpx2.get(f"{server.url}/docs").text
    schema = httpx2.get(f"{server.url}/openapi.json").json()
    assert all(f"<code>{path}</code></h3>" in page for path in schema["paths"])
    assert all(f'id="object-{name}"' in page for name in schema["components"]["schemas"])
    assert {f'id="{link}"' for link in re.findall('href="#(.+?)"', page)} <= set(re.findall('id=".+?"', page))
    assert "<td><code>top_p</code></td><td>number (≥ 0, ≤ 1) or null</td>" in page
    assert not re.search(r"<script|https?://|//[a-z]|src=|url\(|``", page)
    assert NAME not in page, "the page needs no key, so it does not name the model"


def test_the_documentation_can_be_left_out(engine: AsyncEngine) -> None:
    with running(engine, disable_fastapi_docs=True) as silent:
        assert httpx2.get(f"{silent.url}/docs").status_code == 404
        assert httpx2.get(f"{silent.url}/openapi.json").status_code == 404


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def test_replies_have_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: Literal["Paris", "Rome"]
        days: Literal[1, 2]

    asked: Any = {"messages": ASK, "model": NAME, "max_tokens": 220, "temperature": 0}
    parsed = client.chat.completions.parse(**asked, response_format=City)
    assert isinstance(parsed.choices[0].message.parsed, City)
    extra: Any = {"type": "choice", "choice": ["yes", "no"]}
    replies = chat(client, n=3, temperature=1, response_format=extra)
    assert {choice.message.content for choice in replies.choices} <= {"yes", "no"}
    assert chat(client).choices[0].message.content not in ("yes", "no"), "others are free"
    schema = {"name": "x", "schema": {"unevaluatedProperties": False}}
    with pytest.raises(openai.BadRequestError, match="unevaluatedProperties"):
        chat(client, response_format={"type": "json_schema", "json_schema": schema})


@pytest.fixture
def tool_server(engine: AsyncEngine) -> Iterator[RunningServer]:
    """The same model with a template that shows tools, and thoughts."""
    made = engine.generator
    usual = made.template
    made.template = with_tools(usual)
    with running(engine, options={"tool_call_parser": "hermes", "reasoning_parser": "think"}) as server:
        yield server
    made.template = usual


TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_is_made_where_one_must_be(tool_server: RunningServer, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    with small_client(tool_server) as client:
        reply = chat(client, tools=TOOLS, tool_choice=named, max_tokens=120, stream=stream)
        chunks = list(reply) if stream else []
    if stream:
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert (calls[0].function.name, calls[0].id[:5]) == ("weather", "call_")
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        arguments = "".join(call.function.arguments for call in calls)
        assert len(calls) > 2, "arguments come as they are written"
    else:
        (call,) = reply.choices[0].message.tool_calls
        assert (call.function.name, reply.choices[0].finish_reason) == ("weather", "tool_calls")
        assert reply.choices[0].message.content is None
        arguments = call.function.arguments
    given = json.loads(arguments)
    assert given["city"] in ("Paris", "Rome")
    assert 1 <= given["days"] <= 9


def test_some_call_is_made_where_any_will_do(tool_server: RunningServer) -> None:
    with small_client(tool_server) as client:
        reply = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
        (call,) = reply.choices[0].message.tool_calls
        assert call.function.name in ("weather", "clock")
        assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None
        free = chat(client, tools=TOOLS)
        assert free.choices[0].finish_reason in ("stop", "length")
        answered = [
            *ASK,
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
        ]
        assert chat(client, messages=answered, tools=TOOLS).choices
        with pytest.raises(openai.BadRequestError, match="names no function of tools"):
            chat(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "moon"}})

        def allowed(name: str) -> Any:
            tools = [{"type": "function", "function": {"name": name}}]
            return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}

        (call,) = chat(client, tools=TOOLS, tool_choice=allowed("clock"), max_tokens=40).choices[0].message.tool_calls
        assert call.function.name == "clock"
        with pytest.raises(openai.BadRequestError, match="'moon' names no function of tools"):
            chat(client, tools=TOOLS, tool_choice=allowed("moon"))


def test_thoughts_are_told_apart(tool_server: RunningServer) -> None:
    thoughtful: Any = {"type": "grammar", "grammar": 'start: "<think>" /[ab]{3}/ "</think>\\n42"'}
    with small_client(tool_server) as client:
        message = chat(client, response_format=thoughtful, max_tokens=40).choices[0].message
        assert message.content == "42"
        assert re.fullmatch("[ab]{3}", message.reasoning_content)
        deltas = [
            chunk.choices[0].delta for chunk in chat(client, response_format=thoughtful, max_tokens=40, stream=True)
        ]
    assert "".join(delta.content or "" for delta in deltas) == "42"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content


def test_what_a_tool_has_wrong_is_named(tool_server: RunningServer) -> None:
    word = {"type": "object", "properties": {"word": {"type": "string", "pattern": "^(?!x)y$"}}}
    tool = {"type": "function", "function": {"name": "spell", "parameters": word}}
    reply = post(tool_server, "/v1/chat/completions", messages=ASK, tools=[tool], tool_choice="required")
    assert reply.status_code == 400
    says = "tools cannot be followed: spell.properties.word.pattern='^(?!x)y$': look-around, including look-ahead"
    assert reply.json()["error"]["message"].startswith(says)


def test_tools_need_a_known_form_of_calls(server: RunningServer) -> None:
    response = post(server, "/v1/chat/completions", messages=ASK, tools=TOOLS)
    assert response.status_code == 400
    assert "--tool-call-parser" in response.json()["error"]["message"]


def test_sessions_of_lmdeploy(server: RunningServer) -> None:
    def say(prompt: str, **options: Any) -> dict[str, Any]:
        asked = {"session_id": 7, "interactive_mode": True, "temperature": 0, "request_output_len": 12, **options}
        response = post(server, "/v1/chat/interactive", prompt=prompt, **asked)
        assert response.status_code == 200, response.text
        lines: list[dict[str, Any]] = [json.loads(line) for line in response.text.splitlines()]
        return {**lines[-1], "text": "".join(line["text"] for line in lines)}

    first = say("What is 6 times 7?")
    assert "42" in first["text"]
    assert first["history_tokens"] == 0
    second = say("And 2 times 3?", stream=True)
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    last = say("Bye", interactive_mode=False)
    assert last["history_tokens"] > second["history_tokens"]
    assert say("What is 6 times 7?")["history_tokens"] == 0, "it ended"
    assert say("x", cancel=True)["text"] == ""


def test_a_session_has_one_reply_at_a_time(server: RunningServer) -> None:
    asked = {"prompt": "Hi", "session_id": 8, "interactive_mode": True, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/chat/interactive", json=asked, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert post(server, "/v1/chat/interactive", **asked).status_code == 409
        post(server, "/v1/chat/interactive", prompt="", session_id=8, cancel=True)
        assert "was aborted" in list(lines)[-1]


def test_generate(server: RunningServer) -> None:
    ids = post(server, "/tokenize", prompt="The cat").json()["tokens"]
    options = {"temperature": 0, "max_tokens": 6, "return_logprob": True}
    reply = post(server, "/generate", input_ids=ids, **options).json()
    assert reply == post(server, "/generate", prompt="The cat", **options).json()
    info = reply["meta_info"]
    assert info["completion_tokens"] == len(reply["output_ids"]) == len(info["output_token_logprobs"]) == 6
    assert info["finish_reason"] == {"type": "length"}
    events = post(server, "/generate", prompt="The cat", stream=True, **options).text.split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert "".join(piece["text"] for piece in pieces) == reply["text"]
    assert post(server, "/generate").status_code == 400


CLAUDE: dict[str, Any] = {"model": NAME, "max_tokens": 40, "extra_body": {"temperature": 0}}


def claude(server: RunningServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_messages_of_anthropic(server: RunningServer, client: openai.OpenAI) -> None:
    with claude(server) as asker:
        whole = asker.messages.create(messages=ASK, system="Be brief.", **CLAUDE)
        (block,) = whole.content
        assert block.type == "text"
        same = chat(client, messages=[{"role": "system", "content": "Be brief."}, *ASK], max_tokens=40)
        assert block.text == same.choices[0].message.content
        assert whole.stop_reason == "end_turn"
        assert whole.usage.output_tokens == same.usage.completion_tokens
        counted = asker.messages.count_tokens(messages=ASK, system="Be brief.", model=NAME)
        assert counted.input_tokens == same.usage.prompt_tokens
        with asker.messages.stream(messages=ASK, system="Be brief.", **CLAUDE) as stream:
            assert "".join(stream.text_stream) == block.text
            assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
        cut = asker.messages.create(messages=ASK, stop_sequences=["42"], **{**CLAUDE, "max_tokens": 20})
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "42")
        assert asker.messages.create(messages=ASK, **{**CLAUDE, "max_tokens": 1}).stop_reason == "max_tokens"
        city: Any = {"format": {"type": "json_schema", "schema": {"enum": ["Paris", "Rome"]}}}
        (formed,) = asker.messages.create(messages=ASK, output_config=city, **CLAUDE).content
        assert formed.type == "text"
        assert formed.text in ('"Paris"', '"Rome"')
        with pytest.raises(anthropic.BadRequestError, match="session_len"):
            asker.messages.create(messages=[{"role": "user", "content": "word " * SESSION_LEN}], **CLAUDE)
        with pytest.raises(anthropic.NotFoundError, match="not served here"):
            asker.messages.create(messages=ASK, **{**CLAUDE, "model": "claude"})


def test_tools_of_anthropic(tool_server: RunningServer) -> None:
    tools: Any = [{"name": "weather", "description": "of a city", "input_schema": CITY}]
    named: Any = {"type": "tool", "name": "weather"}
    with claude(tool_server) as asker:
        options: Any = {**CLAUDE, "max_tokens": 120, "tools": tools, "tool_choice": named}
        reply = asker.messages.create(messages=ASK, **options)
        (call,) = reply.content
        assert call.type == "tool_use"
        assert (call.name, reply.stop_reason) == ("weather", "tool_use")
        assert call.input["city"] in ("Paris", "Rome")
        with asker.messages.stream(messages=ASK, **options) as stream:
            streamed = stream.get_final_message()
        (again,) = streamed.content
        assert again.type == "tool_use"
        assert again.input == call.input
        result: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "12 degrees"}]
        answered: Any = [*ASK, {"role": "assistant", "content": reply.content}, {"role": "user", "content": result}]
        assert asker.messages.create(messages=answered, **{**options, "max_tokens": 3, "tool_choice": {"type": "auto"}})


def test_the_terminal_talks_with_a_server(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    client = ApiClient(f"{server.url}/v1")
    assert client.model == NAME
    talk = Chat(client, GenerationConfig(temperature=0.0, max_new_tokens=20), Conversation())
    assert talk.take(ASK[0]["content"])
    assert "42" in capsys.readouterr().out
    assert talk.take("word " * SESSION_LEN), "the chat goes on"
    assert "session_len" in capsys.readouterr().err
    session = client.session()
    pieces = client.stream_infer("Once", GenerationConfig(ignore_eos=True), session_id=session.session_id)
    next(pieces)
    client.stop_session(session)
    *_, last = pieces
    assert last.finish_reason is FinishReason.ABORT
    client.close()


def test_servers_that_are_none(server: RunningServer, engine: AsyncEngine) -> None:
    with pytest.raises(ConfigError, match="url='here' is no address"):
        ApiClient("here")
    with pytest.raises(ServerError, match="cannot be reached"):
        ApiClient("http://127.0.0.1:1")
    with running(engine, api_keys=["k"]) as guarded:
        with pytest.raises(ServerError, match="the API key is missing or wrong"):
            ApiClient(guarded.url)
        ApiClient(guarded.url, "k").close()
    other = ApiClient(server.url, model="other")
    with pytest.raises(RequestError, match="'other' is not served here"):
        list(other.stream_infer([*ASK], GenerationConfig(), session_id=0))
    other.close()
