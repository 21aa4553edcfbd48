"""The proxy in front of servers that answer late, refuse, hang and die; real sockets, real clients."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest

from jaxdeploy.cli import main
from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.server.errors import NodeFailedError
from jaxdeploy.server.proxy import framing, nodes, routing
from jaxdeploy.server.proxy.app import create_proxy_app
from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.nodes import HALF_LIFE, Exchange, Node
from jaxdeploy.server.recent import Recent
from jaxdeploy.server.registering import own_url, registered
from tests.fake_node import WORDS, FakeNode, chunk, named
from tests.proxied import ALL, ASK, CHAT, STREAM, Running
from tests.served import until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@contextmanager
def streaming(proxy: Running, path: str = CHAT, ask: dict[str, Any] = STREAM) -> Iterator[Iterator[str]]:
    """The lines of a reply."""
    with proxy.http.stream("POST", path, json=ask) as reply:
        assert reply.status_code == 200, reply.read()
        yield (line for line in reply.iter_lines() if line)


def text(lines: Sequence[str]) -> str:
    """What a chat stream says; it must be whole, with one beginning."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [delta.get("role") for delta in deltas].count("assistant") == 1
    assert lines[-1] == "data: [DONE]"
    return "".join(delta.get("content") or "" for delta in deltas)


def later(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begin ``work`` in a thread; its result."""
    return ThreadPoolExecutor(1).submit(work).result


# What is served


def test_models_of_all_nodes_are_one_list(stack: ExitStack) -> None:
    proxy = Running(stack, "")
    assert proxy.http.get("/health").status_code == 503
    assert proxy.http.post(CHAT, json=ASK).status_code == 503
    for name, models in {"a": ("demo", "small"), "b": ("demo", "large")}.items():
        node = proxy.node(name, models=models)
        assert proxy.http.post("/nodes/add", json={"url": f"{node.url}/"}).json()[node.url]["up"]
        proxy.nodes.append(node)
    assert proxy.http.get("/health").json() == {"status": "healthy"}
    cards = proxy.http.get("/v1/models").json()["data"]
    assert {card["id"]: card["owner"] for card in cards} == {"demo": "a", "small": "a", "large": "b"}
    assert proxy.http.get("/v1/models/large").json()["owner"] == "b"
    assert proxy.http.get("/v1/models/huge").status_code == 404
    assert proxy.http.post(CHAT, json={**ASK, "model": "large"}).status_code == 200
    unknown = proxy.http.post(CHAT, json={**ASK, "model": "huge"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert "model='huge' is not served here; ask for one of 'demo', 'small', 'large'" in unknown.text
    assert proxy.http.post("/nodes/remove", json={"url": proxy.nodes[1].url}).json() == {"removed": True}
    assert proxy.http.post("/nodes/remove", params={"node_url": proxy.nodes[1].url}).json() == {"removed": False}
    assert proxy.http.post(CHAT, json={**ASK, "model": "large"}).status_code == 404
    assert proxy.http.post("/nodes/add", json={"url": "ftp://x"}).status_code == 400
    assert proxy.http.post("/nodes/remove").status_code == 400


def test_a_model_whose_nodes_are_down_is_a_503(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    large = proxy.node("b", models=("large",))
    proxy.http.post("/nodes/add", json={"url": large.url})
    large.does.ill = True
    assert until(lambda: not proxy.status(large)["up"])
    assert proxy.status(large)["why_down"] == "/health answers 503: the engine is gone"
    answer = proxy.http.post(CHAT, json={**ASK, "model": "large"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    large.does.ill = False
    assert until(lambda: proxy.http.post(CHAT, json={**ASK, "model": "large"}).status_code == 200)


def test_what_is_said_passes_unchanged(stack: ExitStack) -> None:
    proxy = Running(stack, "a", server={"api_keys": None})
    (node,) = proxy.nodes
    straight = httpx2.post(node.url + CHAT, json=STREAM).text
    assert proxy.http.post(CHAT, json=STREAM).text == straight
    reply = proxy.http.post(
        f"{CHAT}?x=%2F1", json=ASK, headers={"x-request-id": "mine", "Connection": "x-hop", "X-Hop": "1"}
    )
    assert reply.json() == {"text": ALL}
    assert reply.headers["x-request-id"] == "mine"
    assert "x-secret" not in reply.headers
    headers = node.does.asked[-1][2]
    assert headers["x-request-id"] == "mine"
    assert "x-hop" not in headers
    assert proxy.http.get("/tokenizer_info").status_code == 200, "without a model: the first one's"
    for path in ("/terminate", "/v1/%2e%2e/abort_request", "/nodes/terminate_all", "/"):
        assert proxy.http.post(path).status_code in (404, 405)
    assert not any("abort" in path for path, *_ in node.does.asked)


def test_abort_is_told_to_all(stack: ExitStack) -> None:
    proxy = Running(stack)
    assert proxy.http.post("/abort_request", json={"abort_all": True}).json() == {"aborted": 4}


# Whom a request goes to


def test_the_least_loaded_node_is_asked(stack: ExitStack) -> None:
    proxy = Running(stack)
    for node in proxy.nodes:
        node.does.waits_before = 0
    waiting = [later(lambda: proxy.http.post(CHAT, json=ASK)) for _ in range(6)]
    proxy.asked_of(6)
    assert [node.answered for node in proxy.nodes] == [3, 3]
    assert [proxy.status(node)["in_flight"] for node in proxy.nodes] == [3, 3]
    for node in proxy.nodes:
        node.does.waits_before = None
    assert all(reply().json()["text"] == ALL for reply in waiting)
    assert until(proxy.idle)
    assert proxy.metric(f'requests_total{{node="{proxy.nodes[0].url}",status="200"}}') == 3
    assert proxy.metric("nodes_up") == 2
    assert proxy.metric(f'latency_seconds_count{{node="{proxy.nodes[0].url}"}}') == 3


def asked(**fields: Any) -> Asked:
    return Asked("POST", CHAT, "", {}, b"", "x", fields, None)


def some_nodes(count: int) -> list[Node]:
    return [Node(f"http://{number}") for number in range(count)]


def load(node: Node, count: int) -> None:
    node.exchanges = {cast(Exchange, object()) for _ in range(count)}


def test_latency_is_weighed_by_what_runs() -> None:
    slow, fast, new = some_nodes(3)
    slow.note_latency(4.0)
    fast.note_latency(1.0)
    assert routing.quickest(asked(), [slow, fast]) is fast
    load(fast, 5)
    assert routing.quickest(asked(), [slow, fast]) is slow, "six at the fast one take longer"
    load(new, 1)
    assert routing.quickest(asked(), [slow, fast, new]) is new, "as quick as the quickest, until it is known"
    load(fast, 1)
    assert slow.latency == pytest.approx(4.0, rel=0.01)
    slow._measured -= 3 * HALF_LIFE
    assert slow.latency == pytest.approx(0.5, rel=0.01), "it gets another chance"


def test_prompts_that_begin_alike_go_to_one_node() -> None:
    nodes_ = some_nodes(3)
    router = routing.Router("prefix")

    def turn(*texts: str) -> Node:
        chosen = router.choose(asked(messages=[{"role": "user", "content": each} for each in texts]), nodes_)
        chosen.last_sent = time.monotonic()
        return chosen

    talk = [f"{number}" * 300 for number in range(2)]
    first, second = turn(talk[0]), turn(talk[1])
    assert first is not second
    assert [turn(talk[0], "go on"), turn(talk[1], "go on" * 99)] == [first, second]
    load(first, routing.SLACK + 1)
    assert turn(talk[0]) is not first, "it is much busier"
    load(first, 0)
    assert turn(talk[0], "go on" * 200, "x") is first, "the longest common beginning counts"
    assert turn("hi") is not turn("hi"), "short prompts have nothing to share"


def test_what_is_remembered_is_bounded() -> None:
    recent: Recent[int, int] = Recent(2)
    for key in range(3):
        recent.put(key, key)
        recent.get(0)
    assert [recent.get(key) for key in range(3)] == [0, None, 2]
    keys = list(routing.prefix_keys({"prompt": "x" * 10**6}))
    assert len(keys) == routing.MAX_PREFIX // routing.PIECE == len(set(keys))


def test_a_session_stays_where_it_is(stack: ExitStack) -> None:
    proxy = Running(stack)
    ask = {"prompt": "Hi", "session_id": 7, "interactive_mode": True}
    for _ in range(3):
        assert proxy.http.post("/v1/chat/interactive", json=ask).status_code == 200
    (home,) = proxy.asked_of(3)
    home.does.full_for = 5
    assert proxy.http.post("/v1/chat/interactive", json=ask).status_code == 429, "the others know nothing of it"
    home.kill()
    assert proxy.http.post("/v1/chat/interactive", json=ask).status_code == 200
    assert proxy.other(home).answered == 1


# Nodes that fail


def test_a_node_that_dies_before_the_first_token_is_replaced(stack: ExitStack) -> None:
    proxy = Running(stack)
    for node in proxy.nodes:
        node.does.waits_before = 0
    streams = [later(lambda: proxy.http.post(CHAT, json=STREAM).text) for _ in range(4)]
    wholes = [later(lambda: proxy.http.post(CHAT, json=ASK).json()["text"]) for _ in range(4)]
    proxy.asked_of(8)
    dead, other = proxy.nodes
    dead.kill()
    other.does.waits_before = None
    for stream in streams:
        assert text([line for line in stream().splitlines() if line]) == ALL
    assert [whole() for whole in wholes] == [ALL] * 4
    assert not proxy.status(dead)["up"]
    assert proxy.metric(f'retries_total{{node="{dead.url}",reason="failed"}}') >= 4
    assert proxy.http.post(CHAT, json=ASK).status_code == 200


def test_a_reply_in_one_is_made_again_when_it_breaks_off(stack: ExitStack) -> None:
    proxy = Running(stack)
    proxy.nodes[0].does.waits_before = proxy.nodes[1].does.waits_before = 2
    reply = later(lambda: proxy.http.post(CHAT, json=ASK))
    (node,) = proxy.asked_of()
    proxy.other(node).does.waits_before = None
    node.kill()
    assert reply().json() == {"text": ALL}


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/chat/interactive"])
def test_a_stream_that_breaks_off_ends_with_an_error(stack: ExitStack, path: str) -> None:
    proxy = Running(stack)
    for node in proxy.nodes:
        node.does.waits_before = 1
    with streaming(proxy, path) as lines:
        seen = next(line for line in lines if "one" in line)
        (node,) = proxy.asked_of()
        node.kill()
        rest = list(lines)
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert seen
    assert error["type"] == "server_error"
    assert error["message"].startswith("the node broke off (")
    assert rest[:-1] == (["event: error"] if path == "/v1/messages" else [])
    assert not proxy.other(node).answered
    assert proxy.metric(f'broken_replies_total{{node="{node.url}"}}') == 1


def test_openais_client_is_told(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    proxy.nodes[0].does.waits_before = 1
    client = stack.enter_context(openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0))
    reply = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}], stream=True)
    pieces = iter(reply)
    assert [next(pieces).choices[0].delta.content for _ in range(2)] == ["", "one"]
    proxy.nodes[0].kill()
    with pytest.raises(openai.APIError, match="the node broke off"):
        next(pieces)


def test_pings_pass_and_change_nothing(stack: ExitStack) -> None:
    proxy = Running(stack)
    for node in proxy.nodes:
        node.does.waits_before, node.does.pings = 0, 1
    with streaming(proxy) as lines:
        assert next(lines) == ": ping"
        (node,) = proxy.asked_of()
        proxy.other(node).does.waits_before = None
        node.kill()
        assert text([line for line in lines if line.startswith("data")]) == ALL


def test_after_pings_the_last_word_is_an_error(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    proxy.nodes[0].does.waits_before, proxy.nodes[0].does.pings = 0, 1
    with streaming(proxy) as lines:
        assert next(lines) == ": ping"
        proxy.nodes[0].kill()
        assert "error" in json.loads(list(lines)[-1][6:])


def test_a_node_that_hangs_is_given_up(stack: ExitStack) -> None:
    proxy = Running(stack, heartbeat_timeout=1.0)
    for node in proxy.nodes:
        node.does.waits_before = 1
    with streaming(proxy) as begun:
        next(begun)
        (node,) = proxy.asked_of()
        other = proxy.other(node)
        node.does.hangs, other.does.waits_before = True, None
        replies = [later(lambda: proxy.http.post(CHAT, json=STREAM).text) for _ in range(4)]
        *_, last = begun
        assert json.loads(last[6:])["error"]["message"].startswith("the node has died (it has not answered for 1 s)")
        assert all(text([line for line in reply().splitlines() if line]) == ALL for reply in replies)
    assert node.answered > 1, "some had been sent there"
    assert proxy.status(node)["why_down"] == "it has not answered for 1 s"
    node.does.hangs = False
    assert until(lambda: bool(proxy.status(node)["up"]))


def test_a_node_that_is_told_to_end_finishes_its_replies(stack: ExitStack) -> None:
    proxy = Running(stack)
    for node in proxy.nodes:
        node.does.words, node.does.waits_before = ("x",) * 40, 1
    with streaming(proxy) as lines:
        next(lines)
        (node,) = proxy.asked_of()
        node.listen_no_more()
        assert until(lambda: not proxy.status(node)["up"])
        for words in range(2, 40):
            node.does.waits_before = words
            time.sleep(0.02)
        node.does.waits_before = None
        assert list(lines)[-1] == "data: [DONE]"


def test_a_node_that_is_removed_finishes_its_replies(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    (node,) = proxy.nodes
    node.does.waits_before = 1
    with streaming(proxy) as lines:
        next(lines)
        assert proxy.http.post("/nodes/remove", json={"url": node.url}).json() == {"removed": True}
        assert proxy.http.post(CHAT, json=ASK).status_code == 503
        node.does.waits_before = None
        assert list(lines)[-1] == "data: [DONE]"


def test_one_request_does_not_take_down_all(stack: ExitStack) -> None:
    proxy = Running(stack, "abcd", heartbeat_interval=60)
    for node in proxy.nodes:
        node.does.waits_before = 0
    reply = later(lambda: proxy.http.post(CHAT, json=STREAM))
    for count in range(1, 3):
        found = proxy.asked_of(count)
        assert len(found) == count
        next(node for node in found if proxy.status(node)["in_flight"]).kill()
    assert reply().status_code == 502
    assert "the node broke off" in reply().json()["error"]["message"]
    again = proxy.http.post(CHAT, json=STREAM)
    assert again.status_code == 502
    assert "several nodes have died while they ran this request" in again.json()["error"]["message"]
    for node in proxy.nodes:
        node.does.waits_before = None
    assert proxy.http.post(CHAT, json=ASK).json() == {"text": ALL}, "another request is answered"
    assert len(proxy.asked_of(3)) == 3


def test_a_full_node_sends_requests_elsewhere(stack: ExitStack) -> None:
    proxy = Running(stack)
    full, other = proxy.nodes
    full.does.full_for = 9
    assert [proxy.http.post(CHAT, json=STREAM).status_code for _ in range(4)] == [200] * 4
    assert other.answered == 4
    other.does.full_for = 3
    answer = proxy.http.post(CHAT, json=STREAM)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["message"] == "b is full"


def test_whoever_was_taken_waits_for_room(stack: ExitStack) -> None:
    proxy = Running(stack)
    for node in proxy.nodes:
        node.does.waits_before = 0
    reply = later(lambda: proxy.http.post(CHAT, json=ASK))
    (node,) = proxy.asked_of()
    other = proxy.other(node)
    other.does.full_for, other.does.waits_before = 9, None
    node.kill()
    assert until(lambda: other.answered > 1)
    other.does.full_for = None
    assert reply().json() == {"text": ALL}


def test_a_silent_node_is_a_504(stack: ExitStack) -> None:
    proxy = Running(stack, read_timeout=0.2)
    for node in proxy.nodes:
        node.does.waits_before = 0
    answer = proxy.http.post(CHAT, json=ASK)
    assert answer.status_code == 504
    assert sum(node.answered for node in proxy.nodes) == 1, "a longer wait elsewhere would be no better"


@pytest.mark.slow
def test_nodes_that_die_again_and_again(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "BARRED_SECONDS", 1.0)  # these nodes come back at once, and may die three times in a row
    proxy = Running(stack, "abc", max_attempts=10)
    for node in proxy.nodes:
        node.does.words, node.does.pause = WORDS * 5, 0.02
    end = time.monotonic() + 20

    def one_client(number: int) -> tuple[int, int]:
        whole = broken = 0
        with httpx2.Client(base_url=proxy.url, timeout=20) as http:
            while time.monotonic() < end:
                answer = http.post(CHAT, json=STREAM if number % 4 else ASK)
                if answer.status_code == 503:  # on a slow machine there may be a moment without any node
                    assert "no node that serves" in answer.json()["error"]["message"]
                    continue
                if number % 4 == 0:
                    assert answer.json() == {"text": ALL * 5}
                    continue
                lines = [line for line in answer.text.splitlines() if line]
                if "error" in json.loads(lines[-1][6:] if lines[-1] != "data: [DONE]" else "{}"):
                    assert "one" in lines[1], "it had begun"
                    broken += 1
                else:
                    assert text(lines) == ALL * 5
                    whole += 1
        return whole, broken

    with ThreadPoolExecutor(24) as clients:
        counts = [clients.submit(one_client, number) for number in range(24)]
        mixed = random.Random(0)
        while time.monotonic() < end:
            time.sleep(0.7)
            at = mixed.randrange(3)
            does, port = proxy.nodes[at].does, proxy.nodes[at].port
            proxy.nodes[at].kill()
            time.sleep(0.3)
            proxy.nodes[at] = proxy.node("n", port=port, words=does.words, pause=does.pause)
        whole, broken = (sum(counted) for counted in zip(*(count.result() for count in counts), strict=True))
    assert whole > 100
    assert broken > 5
    assert until(proxy.idle)
    assert until(lambda: proxy.metric("nodes_up") == 3)


# Clients


def test_a_client_that_leaves_ends_its_request(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    (node,) = proxy.nodes
    for word in (0, 1):
        node.does.waits_before, node.does.left = word, 0
        with pytest.raises(httpx2.ReadTimeout), proxy.http.stream("POST", CHAT, json=STREAM, timeout=0.8) as reply:
            list(reply.iter_lines())
        assert until(lambda: node.does.left == 1)
        assert until(proxy.idle)


def test_a_client_that_does_not_read_holds_back_its_node(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    (node,) = proxy.nodes
    with streaming(proxy, ask={**STREAM, "endless": True}) as lines:
        next(lines)
        before = -1
        while before != node.does.written:
            before = node.does.written
            time.sleep(0.3)
        assert node.does.written < 32 * 1024**2
    assert until(proxy.idle)


def test_keys_stay_where_they_belong(stack: ExitStack) -> None:
    node = FakeNode("n", key="of-node")
    stack.callback(node.close)
    proxy = Running(stack, "", {"api_keys": ["of-proxy"]}, nodes=[node.url], node_api_key="of-node")
    assert proxy.http.get("/health").status_code == 200
    for method, path in (("GET", "/nodes/status"), ("POST", "/nodes/add"), ("GET", "/v1/models"), ("POST", CHAT)):
        assert proxy.http.request(method, path, json={}).status_code == 401
    key = {"Authorization": "Bearer of-proxy", "x-api-key": "of-proxy"}
    assert proxy.http.post(CHAT, json=ASK, headers=key).status_code == 200
    headers = node.does.asked[0][2]
    assert headers["authorization"] == "Bearer of-node"
    assert "x-api-key" not in headers

    without = Running(stack, "", nodes=[node.url])
    assert without.status(node)["why_down"].startswith("it asks for a key; ")
    node.does.key = None
    assert until(lambda: bool(without.status(node)["up"]))
    without.http.post(CHAT, json=ASK, headers=key)
    assert "authorization" not in node.does.asked[-1][2], "a client's key is not for nodes"


# Framing


def test_events_are_held_until_one_says_something() -> None:
    events = framing.Events()
    role, ping, word = chunk({"role": "assistant", "content": ""}), ": ping\n\n", chunk({"content": "x"})
    assert events.feed(f"{role}{ping}{word[:9]}".encode()) == ping.encode()
    assert events.feed(word[9:].encode()) == (role + word).encode()
    assert events.opened
    assert events.feed(b"data: [DO") == b""
    assert events.feed(b"NE]\r\n\r\nx") == b"data: [DONE]\r\n\r\n"
    assert events.end() == b"x"


@pytest.mark.parametrize(
    ("event", "opens"),
    [
        (named("message_start"), False),
        (named("ping"), False),
        (named("response.failed"), False),
        (named("response.failed") + named("error", error={"type": "invalid_request_error"}), True),
        (named("content_block_delta", delta={}), True),
        ('data: {"choices": [{"text": "", "finish_reason": null}]}\n\n', False),
        ('data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n', True),
        ('data: {"choices": [{"delta": {"tool_calls": [{}]}}]}\n\n', True),
        ('data: {"choices": [], "usage": {}}\n\n', True),
        ('data: {"error": {"type": "invalid_request_error"}}\n\n', True),
        ("data: [DONE]\n\n", True),
        ("data: 5\n\n", True),
    ],
)
def test_what_says_something(event: str, opens: bool) -> None:
    events = framing.Events()
    events.feed(event.encode())
    assert events.opened == opens


def test_an_error_of_the_engine_is_a_failure_of_the_node() -> None:
    with pytest.raises(NodeFailedError, match="the node failed: gone"):
        framing.Events().feed(b'data: {"error": {"type": "server_error", "message": "gone"}}\n\n')
    events = framing.Events()
    with pytest.raises(NodeFailedError, match="the node failed: gone"):
        events.feed(
            (named("response.failed") + named("error", error={"type": "server_error", "message": "gone"})).encode()
        )


def test_a_large_reply_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_HELD", 10)
    whole = framing.framing_of("application/json; charset=utf-8")
    assert [whole.feed(b"123456"), whole.feed(b"7890x"), whole.feed(b"y"), whole.end()] == [
        b"",
        b"1234567890x",
        b"y",
        b"",
    ]
    with pytest.raises(NodeFailedError, match="more than 10 bytes"):
        framing.Events().feed(b"data: 12345678")


# Starting


def test_a_server_registers_and_takes_its_leave(stack: ExitStack) -> None:
    proxy = Running(stack, "", operator_keys=["key"])
    node = proxy.node("n")
    proxy.http.headers["Authorization"] = "Bearer key"
    config = ServerConfig(server_port=node.port, proxy_url=proxy.url, proxy_api_key="key")

    async def serving() -> None:
        async with registered(config):
            while proxy.http.get("/health").status_code != 200:
                await asyncio.sleep(0.01)
            assert list(proxy.http.get("/nodes/status").json()) == [node.url]

    asyncio.run(serving())
    assert proxy.http.get("/nodes/status").json() == {}


def test_a_server_waits_for_its_proxy(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxdeploy.server.registering.SOON_SECONDS", 0.01)

    async def serving() -> None:
        async with registered(ServerConfig(proxy_url="http://127.0.0.1:9")):
            await asyncio.sleep(0.2)

    asyncio.run(serving())
    assert len([line for line in caplog.messages if "does not take this server yet" in line]) == 1


def test_the_address_of_a_server() -> None:
    assert own_url(ServerConfig(node_url="http://x:1")) == "http://x:1"
    assert own_url(ServerConfig(server_name="::1", server_port=5, ssl=True)) == "https://[::1]:5"
    assert own_url(ServerConfig(proxy_url="http://127.0.0.1:8000")) == "http://127.0.0.1:23333"
    with pytest.raises(ConfigError, match=r"proxy_url='http://x\.invalid' cannot be resolved"):
        own_url(ServerConfig(proxy_url="http://x.invalid"))


def test_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert ProxyConfig(routing_strategy="min_observed_latency").routing_strategy == "latency"
    with pytest.raises(ConfigError, match="routing_strategy='fastest' is not one of"):
        ProxyConfig(routing_strategy="fastest")
    with pytest.raises(RequestError, match="url='nowhere' is no address"):
        create_proxy_app(ProxyConfig(nodes=["http://a,nowhere"]), ServerConfig())
    for flags, complaint in {
        ("proxy", "model"): "argument='model' is one too many: a proxy has no model; name its servers with --nodes",
        ("proxy", "--tp", "2"): "tp is a flag of api_server",
        ("proxy", "--proxy-url", "x"): "proxy_url is a flag of api_server",
        ("api_server", "--nodes", "x"): "nodes is a flag of proxy",
    }.items():
        assert main(["serve", *flags]) == 2
        assert capsys.readouterr().err.startswith(f"error: {complaint}")


def test_a_proxy_needs_no_jax() -> None:
    code = "import sys, jaxdeploy.cli.serve, jaxdeploy.server.proxy.run; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
