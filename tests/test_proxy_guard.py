"""The proxy against clients and nodes that mean harm: routes, keys, and answers that break every rule."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.server import listening
from jaxdeploy.server.dependencies import _tenant
from jaxdeploy.server.errors import NodeFailedError
from jaxdeploy.server.proxy import framing, nodes, suspects
from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.routes import FORWARDED
from jaxdeploy.server.proxy.suspects import Suspects
from jaxdeploy.server.registering import registered
from jaxdeploy.server.routes import routers
from jaxdeploy.server.security import TENANT
from tests.fake_node import named
from tests.proxied import ASK, CHAT, STREAM, Running
from tests.raw_node import RawNode, whole
from tests.served import until

NOT_FORWARDED = {
    *(("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")),  # they are about one node
    *(("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{name:path}")),
    *(("GET", "/anthropic/v1/models"), ("POST", "/abort_request")),  # the proxy has its own
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


# Which requests reach a node


def test_each_route_of_a_server_is_forwarded_or_left_out_on_purpose() -> None:
    served: set[tuple[str, str]] = set()
    for router in routers():
        for route in router.routes:
            made: Any = route
            served |= {(method, made.path) for method in made.methods}
    assert served == set(FORWARDED) | NOT_FORWARDED


TRICKS = [
    *("/v1/..;/metrics", "/v1//load_lora_adapter", "/v1/load_lora_adapter", "/v1/load_lora_adapter%20"),
    *("/v1/load_lora_adapter%00", "/v1/load_lora_adapter/", "/tokenizer_info/..%5cmetrics", "/v1/@evil/x", "/v1/x"),
    *("/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/v1/./chat/completions"),
    *("/V1/chat/completions", "/v1/chat/completions%20", "/v1/chat/completions%00", "/v1/chat/completions;x=1"),
    *("/v1/chat%2fcompletions", "/v1%2Fchat%2Fcompletions", "/v1/%63hat/completions", "/v1/chat\\completions"),
    *("/v1/chat/../chat/completions", "/v1/chat/completions/../../metrics", "/v1/%2e%2e/metrics", "/generate/x"),
    *("/v1/chat/completion\u0455", "/v1/chat/completions%E2%80%8B", "/tokenize%0d%0aX:1"),
    *("/v1/responses/", "/v1/responses/a/b", "/v1/responses/..", "/v1/responses/%2e%2e", "/v1/responses/a%2fb"),
    *("/v1/responses/a;b", "/v1/responses/" + "x" * 129, "/v1/responses/a%00", "/v1/responses/a.b", "*", "evil:1"),
    *(
        "http://evil/v1/x",
        "http://evil@127.0.0.1/v1/load_lora_adapter",
        "http://evil/v1/chat/completions/",
        "/terminate",
        "/",
    ),
]


def asked_for(url: str, line: str, body: bytes = b"{}") -> int:
    """The status of an answer to a request line that no client library would send; 0: none."""
    host, port = url.removeprefix("http://").split(":")
    head = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(head + body)
            answer = connection.recv(64)
        except ConnectionError:
            return 0
    return int(answer.split()[1]) if answer else 0


def mutated(path: str, mixed: random.Random) -> str:
    """``path`` with a few parts put in, doubled, taken out or written otherwise."""
    pieces = [
        "..",
        "//",
        "/",
        ";",
        "%2f",
        "%5c",
        "%00",
        "%20",
        "%2e",
        "@",
        "\\",
        "?x",
        "#",
        ":",
        "%c0%af",
        "\u2215",
        ".",
    ]
    for _ in range(mixed.randint(1, 3)):
        at = mixed.randrange(len(path) + 1)
        kind = mixed.randrange(4)
        if kind == 0:
            path = path[:at] + mixed.choice(pieces) + path[at:]
        elif kind == 1:
            path = path[:at] + path[at : at + 1].swapcase() + path[at + 1 :]
        elif kind == 2 and path[at : at + 1].isalpha():
            path = f"{path[:at]}%{ord(path[at]):02x}{path[at + 1 :]}"
        else:
            path = path[:at] + path[at + 1 :]
    return path.replace(" ", "")


def test_only_listed_routes_reach_a_node(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    (node,) = proxy.nodes
    paths = [path.replace("{response_id}", "resp_1") for _, path in FORWARDED]
    allowed = {f"{method} {path.replace('{response_id}', 'resp_1')}" for method, path in FORWARDED}
    for line in sorted(allowed):
        assert asked_for(proxy.url, line) == 200, line
    assert sorted(node.does.targets) == sorted(allowed)
    assert asked_for(proxy.url, "POST http://evil/generate") == 404, "the form for forward proxies (RFC 9112, 3.2.2)"
    before = len(node.does.targets)
    for trick, method in itertools.product(TRICKS, ("GET", "POST")):
        assert asked_for(proxy.url, f"{method} {trick}") in (400, 404, 0), trick
    for path, method in itertools.product(["/generate", "/v1/responses/a"], ("PUT", "PATCH", "HEAD", "OPTIONS", "X")):
        assert asked_for(proxy.url, f"{method} {path}") in (400, 404), method
    assert len(node.does.targets) == before
    mixed = random.Random(18)
    for _ in range(300):
        asked_for(proxy.url, f"{mixed.choice(['GET', 'POST', 'DELETE'])} {mutated(mixed.choice(paths), mixed)}")
    may_come = {line.replace("resp_1", "") for line in allowed}
    for target in node.does.targets:
        method, path = target.split(" ")
        known = f"{method} /v1/responses/" if path.startswith("/v1/responses/") else target
        assert known in may_come, target
        assert path.removeprefix("/v1/responses/").isascii()


def test_a_query_cannot_change_the_path(stack: ExitStack) -> None:
    proxy = Running(stack, "a")
    assert asked_for(proxy.url, "GET /tokenizer_info?x=/../metrics&y=%23%2F") == 200
    assert proxy.nodes[0].does.targets == ["GET /tokenizer_info"]
    for query in ("a#b/../../metrics", 'x"y', "x" * 3000):
        assert asked_for(proxy.url, f"GET /tokenizer_info?{query}") in (200, 400, 404)
    assert set(proxy.nodes[0].does.targets) == {"GET /tokenizer_info"}


# Keys


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


OPERATORS = (("GET", "/nodes/status"), ("GET", "/metrics"), ("POST", "/nodes/add"), ("POST", "/nodes/remove"))


def test_a_client_cannot_add_a_node_and_collect_keys(stack: ExitStack) -> None:
    proxy = Running(stack, "", {"api_keys": ["client"]}, operator_keys=["boss"])
    page = proxy.http.get("/docs", headers={"Authorization": ""})
    assert (page.status_code, "/nodes/add" in page.text) == (200, True), "the documentation needs no key"
    mine, theirs = proxy.node("mine", key="of-mine"), proxy.node("theirs", key="of-theirs", models=("other",))
    evil = proxy.node("evil")
    for (method, path), key in itertools.product(OPERATORS, ("", "client", "wrong")):
        answer = proxy.http.request(method, path, json={"url": evil.url}, headers=bearer(key) if key else {})
        assert answer.status_code == (403 if key == "client" else 401), (path, key)
    assert proxy.http.post("/abort_request", json={"abort_all": True}, headers=bearer("client")).status_code == 403
    assert proxy.http.post("/abort_request", json={"request_id": "x"}, headers=bearer("client")).status_code == 200
    proxy.http.headers.update(bearer("boss"))
    for node in (mine, theirs):
        added = proxy.http.post("/nodes/add", json={"url": node.url, "api_key": node.does.key})
        assert added.json()[node.url]["up"]
    assert proxy.http.post("/nodes/add", json={"url": evil.url}).json()[evil.url]["up"], "without a key"
    client = {**bearer("client"), "x-api-key": "client", "Cookie": "c=client", "X-Forwarded-For": "1.2.3.4"}
    for _ in range(4):
        assert proxy.http.post(CHAT, json=ASK, headers=client).status_code == 200
    assert proxy.http.post(CHAT, json={**ASK, "model": "other"}, headers=client).status_code == 200
    for node, own in ((mine, "Bearer of-mine"), (theirs, "Bearer of-theirs"), (evil, None)):
        assert node.answered
        for _, _, headers in node.does.asked:
            assert headers.get("authorization") == own
            assert not {"x-api-key", "cookie", "x-forwarded-for"} & set(headers)
            assert "client" not in str(headers.values())


def test_a_registration_cannot_replace_the_key_of_a_node(stack: ExitStack) -> None:
    proxy = Running(stack, "")
    node = proxy.node("n", key="right")
    assert proxy.http.post("/nodes/add", json={"url": node.url, "api_key": "right"}).json()[node.url]["up"]
    for url in (node.url, f"{node.url}/", f"{node.url}/v1", node.url.replace("http", "HTTP")):
        answer = proxy.http.post("/nodes/add", json={"url": url, "api_key": "evil"})
        assert (answer.status_code, "known with another key" in answer.text) == (409, True)
    assert proxy.http.post("/nodes/add", json={"url": node.url}).json()[node.url]["up"], "without a key: as before"
    node.does.key = "new"
    assert until(lambda: not proxy.status(node)["up"])
    assert "it asks for a key" in proxy.status(node)["why_down"]
    assert proxy.http.post("/nodes/add", json={"url": node.url, "api_key": "new"}).json()[node.url]["up"]
    for key in ("", "a b", "x\ny", "\u00e9", "k" * 600, 5):
        assert proxy.http.post("/nodes/add", json={"url": node.url, "api_key": key}).status_code == 400


@pytest.mark.parametrize(
    ("server", "config", "status"),
    [
        ({}, {}, 200),
        ({"api_keys": ["k"]}, {}, 403),
        ({}, {"node_api_key": "k"}, 403),
        ({}, {"operator_keys": ["o", "k"]}, 200),
        ({}, {"operator_keys": ["o"]}, 403),
    ],
)
def test_who_is_an_operator(stack: ExitStack, server: dict[str, Any], config: dict[str, Any], status: int) -> None:
    """Without operators' keys the routes are closed as soon as there is any other key."""
    proxy = Running(stack, "", server, **config)
    for method, path in OPERATORS[:2]:
        answer = proxy.http.request(method, path, headers=bearer("k"))
        assert answer.status_code == status, answer.text
    if status == 403 and "operator_keys" not in config:
        assert "/metrics is closed; start the proxy with --operator-keys KEY" in answer.text


def test_a_node_can_tell_clients_apart(stack: ExitStack) -> None:
    """By a name of their key that does not give the key away, and that a client cannot choose."""
    proxy = Running(stack, "a", {"api_keys": ["one", "two"]}, operator_keys=["boss"])
    for key in ("one", "two", "one"):
        assert proxy.http.post(CHAT, json=ASK, headers={**bearer(key), TENANT: "0" * 16}).status_code == 200
    asked = proxy.nodes[0].does.asked
    first, second, third = [headers[TENANT] for _, _, headers in asked]
    assert first == third != second
    assert len(first) == 16
    assert hashlib.sha256(b"one").hexdigest()[:16] != first
    assert proxy.http.post("/abort_request", json={"request_id": "x"}, headers=bearer("two")).json() == {"aborted": 2}
    assert asked[-1][2][TENANT] == second, "it ends no request of another client"
    assert proxy.http.post("/abort_request", json={"abort_all": True}, headers=bearer("boss")).json() == {"aborted": 2}
    assert TENANT not in asked[-1][2]


def owner_of(separates: bool, named: str) -> str:
    state = SimpleNamespace(separates_keys=False, separates_tenants=separates)
    scope = {"type": "http", "headers": [(TENANT.encode(), named.encode())], "app": SimpleNamespace(state=state)}
    return asyncio.run(_tenant(Request(scope))).owner


def test_a_server_separates_the_clients_of_a_proxy() -> None:
    assert owner_of(True, "0123456789abcdef") == "/0123456789abcdef"
    assert owner_of(True, "x" * 99) == owner_of(True, "") == owner_of(False, "0123456789abcdef") == ""


def test_an_empty_operators_key_is_refused() -> None:
    for keys in ([""], [], ["a", " b"]):
        with pytest.raises(ConfigError, match="operator_keys"):
            ProxyConfig(operator_keys=keys)


def test_a_server_registers_with_its_own_key(stack: ExitStack) -> None:
    proxy = Running(stack, "", {"api_keys": ["client"]}, operator_keys=["boss"])
    node = proxy.node("n", key="of-node")
    config = ServerConfig(
        server_port=node.port, proxy_url=proxy.url, proxy_api_key="boss", api_keys=["of-node", "of-somebody"]
    )

    async def serving() -> None:
        async with registered(config):
            while proxy.http.get("/health").status_code != 200:
                await asyncio.sleep(0.01)

    asyncio.run(serving())
    assert proxy.http.get("/nodes/status", headers=bearer("boss")).json() == {}, "it took its leave"


@pytest.mark.parametrize(
    "url",
    [
        *("http://u:p@h", "http://h?x", "http://h/#x", "http://h/a b", "http://h/%2e", "gopher://h"),
        *("http://", "http://h:99999", "http://h/\u00e9", "http://" + "h" * 600, "file:///etc/passwd", "http://h/;x"),
    ],
)
def test_what_is_no_address_of_a_node(url: str) -> None:
    with pytest.raises(RequestError, match="is no address"):
        nodes.checked_url(url)


# Nodes that lie


def models(*cards: Any) -> list[bytes]:
    return whole({"data": list(cards)})


def raw(body: str) -> list[bytes]:
    return whole(body.encode())


def endless(head: str, piece: bytes = b"x" * 65536) -> Iterable[bytes]:
    yield f"HTTP/1.1 {head}\r\n\r\n".encode()
    yield from itertools.repeat(piece)


UNWELL: dict[str, Any] = {
    "created='soon'": models({"id": "m", "created": "soon"}),
    "created=1000000000000000000000": models({"id": "m", "created": 10**21}),
    "created=-1": models({"id": "m", "created": -1}),
    "created=True": models({"id": "m", "created": True}),
    "created=253402300800": models({"id": "m", "created": 253402300800}),
    "no list of models": raw('{"data": [{"id": "m", "created": NaN}]}'),
    "max_model_len=inf": raw('{"data": [{"id": "m", "max_model_len": 1e999}]}'),
    "owned_by='\\ud83d'": raw('{"data": [{"id": "m", "owned_by": "\\ud83d"}]}'),
    "whose id is no text": models({"id": ["m"]}),
    "has id='\\ud83d'": raw('{"data": [{"id": "\\ud83d"}]}'),
    "lists 1001 models": models(*({"id": str(number)} for number in range(1001))),
    "more than 1048576 bytes": models(*({"id": str(number)} for number in range(100_000))),
    "is no object of at most": models(5),
    "and no list of models": raw("[" * 100_000),
    "answers 200 and no list": whole({"data": {"id": "m"}}),
    "status 302": whole({}, 302, "text/html", "Location: http://127.0.0.1:1/"),
    "compresses its answer": whole({"data": []}, 200, "application/json", "Content-Encoding: gzip"),
    "more than 100 headers": whole({}, 200, "application/json", *(f"X-{number}: 1" for number in range(200))),
    "has more than 1048576": lambda: endless("200 OK"),
    "answers 404": whole({}, 404),
}


def test_what_a_node_says_of_its_models_is_checked(stack: ExitStack) -> None:
    liars = {why: RawNode(**{"/v1/models": answer}) for why, answer in UNWELL.items()}
    liars["/health answers 503"] = RawNode(**{"/health": whole({"error": {"message": "\ud83d\n" * 999}}, 503)})
    liars["has more than 65536 bytes"] = RawNode(**{"/health": lambda: endless("503 X")})
    well = RawNode(**{"/v1/models": models({"id": "w", "created": 1.7e9, "permission": [{}], "é": None})})
    every = [*liars.values(), well]
    for node in every:
        stack.callback(node.close)
    proxy = Running(stack, "a", nodes=[node.url for node in every])
    proxy.http.post("/nodes/add", json={"url": proxy.nodes[0].url})
    begun = time.monotonic()
    listed = proxy.http.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["w", "demo"]
    assert listed[0] == {"id": "w", "created": 1700000000, "é": None}
    assert len(proxy.http.get("/anthropic/v1/models").json()["data"]) == 2
    found = proxy.statuses()
    assert time.monotonic() - begun < 2
    for why, node in liars.items():
        assert why in found[node.url]["why_down"], found[node.url]["why_down"]
        assert len(found[node.url]["why_down"]) <= nodes.MAX_REASON
    assert proxy.http.post(CHAT, json=ASK).status_code == 200


EVENT = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def dripping(head: bytes, piece: bytes) -> Iterator[bytes]:
    """``piece`` again and again, always in time, and never a whole."""
    yield head
    while True:
        time.sleep(0.05)
        yield piece


def stalling(head: bytes) -> Iterator[bytes]:
    """``head``, and nothing for longer than a proxy waits."""
    yield head
    time.sleep(3)


LIES: dict[str, tuple[Any, int, str]] = {
    "429, endless": (lambda: endless("429 X"), 429, "the node answers 429 and does not say why"),
    "429, html": (lambda: whole(b"<script>", 429, "text/html"), 429, "the node answers 429 and does not say why"),
    "500, half an emoji": (lambda: raw_status(500, b'{"error": {"message": "\\ud83d"}}'), 500, "ud83d"),
    "400, no UTF-8": (lambda: raw_status(400, b'{"error": "\xff\xfe"}'), 400, "the node answers 400"),
    "redirect": (lambda: whole({}, 307, "application/json", "Location: http://127.0.0.1:1/"), 502, "status 307"),
    "no content": (lambda: whole(b"", 204), 502, "status 204"),
    "status 999": (lambda: whole({}, 999), 502, "status 999"),
    "html": (lambda: whole(b"<script>alert(1)</script>", 200, "text/html"), 502, "Content-Type 'text/html'"),
    "compressed": (lambda: whole(b"x", 200, "application/json", "Content-Encoding: br"), 502, "compresses"),
    "no JSON": (lambda: whole(b"{"), 502, "the node's reply is not JSON"),
    "deep JSON": (lambda: whole(b"[" * 200_000), 502, "the node's reply is not JSON"),
    "an endless event": (lambda: endless(STREAM_HEAD[9:-2].decode()), 502, "an event of the node has more than"),
    "an endless line": (lambda: endless("200 OK\r\nContent-Type: application/x-ndjson"), 502, "a line of the node has"),
    "too short": (lambda: [STREAM_HEAD + b"Content-Length: 99\r\n\r\n: x"], 502, "the node broke off"),
    "bad chunks": (lambda: [CHUNKED + b"zz\r\nx"], 502, "the node broke off"),
    "endless headers": (
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"x" * 65536)),
        *(502, "the node broke off"),
    ),
    "endless continues": (lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 99), 504, "nothing for too long"),
    "a slow head": (lambda: dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), 504, "nothing for too long"),
    "a slow event": (lambda: dripping(STREAM_HEAD + b"\r\n", b"x"), 504, "nothing for too long"),
    "a slow error": (lambda: dripping(b"HTTP/1.1 400 X\r\n\r\n", b" "), 504, "nothing for too long"),
    "no HTTP": (lambda: [b"\x00\xff" * 99], 502, "the node broke off"),
    "an odd event": (lambda: [STREAM_HEAD + b'\r\ndata: {"type": [], "choices": [[]]}\n\n'], 200, '"type": []'),
    "an odd failure": (
        lambda: [STREAM_HEAD + b'\r\ndata: {"error": {"type": "api_error", "message": "\\ud83d"}}\n\n'],
        *(502, "the node failed:"),
    ),
}


def raw_status(status: int, body: bytes) -> list[bytes]:
    return whole(body, status)


def test_what_a_node_replies_is_checked(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_HELD", 256 * 1024)
    liars = {}
    for number, (lie, (answer, _, _)) in enumerate(LIES.items()):
        liars[lie] = RawNode(**{"": answer, "/v1/models": models({"id": f"liar-{number}"})})
        stack.callback(liars[lie].close)
    urls = [node.url for node in liars.values()]
    proxy = Running(stack, "", heartbeat_interval=60, read_timeout=0.4, nodes=urls)
    for number, (lie, (_, status, says)) in enumerate(LIES.items()):
        answer = proxy.http.post(CHAT, json={**ASK, "model": f"liar-{number}"})
        assert (answer.status_code, says in answer.text) == (status, True), (lie, answer.status_code, answer.text[:300])
        assert answer.headers["content-type"].partition(";")[0] in ("application/json", "text/event-stream"), lie
        assert liars[lie].sent < 64 * 1024**2, lie
    found = proxy.statuses()
    assert "status 307" in found[liars["redirect"].url]["why_down"]
    assert "Content-Type 'text/html'" in found[liars["html"].url]["why_down"]
    assert found[liars["no JSON"].url]["up"], "a client may have caused it"
    assert proxy.http.get("/v1/models").status_code == 200
    for _ in range(nodes.FAULTS):
        proxy.http.post(CHAT, json={**ASK, "model": "liar-14", "seed": random.random()})
    assert "3 requests in a row failed there" in proxy.statuses()[liars["bad chunks"].url]["why_down"]


LINES_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n"
DELTA = named("content_block_delta", delta={"text": "x"}).encode()
ERROR = b'data: {"error": {"type": "server_error", "message": "out of memory"}}\n\n'
CUT: dict[str, tuple[bytes, bytes]] = {
    "chat": (STREAM_HEAD + b"\r\n" + EVENT, EVENT),
    "half an event": (STREAM_HEAD + b"\r\n" + EVENT + EVENT[:20], EVENT),
    "a ping after it": (STREAM_HEAD + b"\r\n" + EVENT + b": ping\n\n", EVENT + b": ping\n\n"),
    "whole in HTTP": (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVENT), EVENT), EVENT),
    "messages": (STREAM_HEAD + b"\r\n" + DELTA, DELTA + b"event: error\n"),
    "lines": (LINES_HEAD + b'{"finish_reason": "stop"}\n{"finish_reason": null}\n', b'{"finish_reason": "stop"}\n'),
    "half a line": (LINES_HEAD + b'{"text": "x"}\n{"te', b'{"text": "x"}\n'),
}
"""Streams that break off, and what the client has of them before the error."""
ENDED = {
    "done": STREAM_HEAD + b"\r\n" + EVENT + b"data: [DONE]\n\n",
    "done, and a ping": STREAM_HEAD + b"\r\n" + EVENT + b"data: [DONE]\n\n: ping\n\n",
    "done, without a blank line": STREAM_HEAD + b"\r\n" + EVENT + b"data: [DONE]",
    "an error": STREAM_HEAD + b"\r\n" + EVENT + ERROR,
    "messages": STREAM_HEAD + b"\r\n" + DELTA + named("message_stop").encode(),
    "responses": STREAM_HEAD + b"\r\n" + named("response.incomplete").encode(),
    "lines": LINES_HEAD + b'{"finish_reason": null}\n{"finish_reason": "length"}\n',
    "lines, without a line end": LINES_HEAD + b'{"finish_reason": null}\n{"finish_reason": "stop"}',
    "lines of others": LINES_HEAD + b'{"text": "x"}\n',
}


def test_a_stream_without_its_end_ends_with_an_error(stack: ExitStack) -> None:
    answers = [answer for answer, _ in CUT.values()] + [*ENDED.values(), STREAM_HEAD + b"\r\n: ping\n\n"]
    made = [RawNode(**{"": [a], "/v1/models": models({"id": f"cut-{at}"})}) for at, a in enumerate(answers)]
    for node in made:
        stack.callback(node.close)
    proxy = Running(stack, "", heartbeat_interval=60, max_attempts=1, nodes=[node.url for node in made])
    replies = [proxy.http.post(CHAT, json={**STREAM, "model": f"cut-{at}"}) for at in range(len(answers))]
    for (cut, (_, before)), reply in zip(CUT.items(), replies, strict=False):
        last = reply.text.rstrip("\n").rpartition("\n")[2].removeprefix("data: ")
        assert reply.content.startswith(before), cut
        assert "the node broke off" in json.loads(last)["error"]["message"], cut
        assert reply.text.count("the node broke off") == 1, cut
    for (ended, answer), reply in zip(ENDED.items(), replies[len(CUT) :], strict=False):
        assert reply.content == answer.partition(b"\r\n\r\n")[2], ended
    assert "the node broke off" in replies[-1].text


def test_a_large_reply_that_breaks_off_is_one_line_of_the_log(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(framing, "MAX_HELD", 100)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    broken = RawNode(**{"": [head + b"x" * 200]})
    silent = RawNode(**{"": lambda: stalling(head + b"x" * 200)})
    silent.answers["/v1/models"] = models({"id": "silent"})
    stack.callback(broken.close)
    stack.callback(silent.close)
    proxy = Running(stack, "", heartbeat_interval=60, read_timeout=0.2, nodes=[broken.url, silent.url])
    for model, says in (("demo", "the node broke off"), ("silent", "nothing for too long")):
        with caplog.at_level("WARNING"), pytest.raises(httpx2.RemoteProtocolError):
            proxy.http.post(CHAT, json={**ASK, "model": model})
        assert until(lambda: not any(node["in_flight"] for node in proxy.statuses().values()))
        lines = [record for record in caplog.records if listening._is_news(record)]
        assert [says in record.getMessage() for record in lines] == [True], model
        assert not any(record.exc_info for record in caplog.records)
        caplog.clear()


def test_headers_of_a_node_are_those_of_a_list(stack: ExitStack) -> None:
    evil = ("Set-Cookie: a=b", "X-Name: \u00e9\u4e2d", "Access-Control-Allow-Origin: *", "Refresh: 0; url=http://evil")
    head = whole({"text": "x"}, 200, "Application/JSON; charset=utf-8", *evil, "Cache-Control: no-cache")
    node = RawNode(**{"": head})
    stack.callback(node.close)
    proxy = Running(stack, "", nodes=[node.url])
    answer = proxy.http.post(CHAT, json=ASK)
    assert answer.json() == {"text": "x"}
    assert set(answer.headers) == {"content-type", "content-length", "cache-control", "x-request-id", "date", "server"}
    assert proxy.http.post(CHAT, json=ASK).status_code == 200
    assert not any(b"cookie" in head.lower() for head in node.asked)


def test_large_streams_take_little_time() -> None:
    events = framing.Events()
    begun = time.process_time()
    for _ in range(framing.MAX_HELD // 65536):
        assert not events.feed(b"x" * 65536)
    with pytest.raises(NodeFailedError, match="an event of the node has more than"):
        events.feed(b"x")
    assert time.process_time() - begun < 2, "each byte is looked at once"


# Nodes that come and go


def test_nodes_are_bounded_and_dead_ones_expire(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MAX_NODES", 4)
    proxy = Running(stack, "a")
    urls = [f"http://127.0.0.1:1/{number}" for number in range(4)]
    answers = [proxy.http.post("/nodes/add", json={"url": url}) for url in urls]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert "the proxy has 4 nodes" in answers[-1].text
    monkeypatch.setattr(nodes, "UNSEEN_SECONDS", 0.1)
    assert until(lambda: list(proxy.statuses()) == [proxy.nodes[0].url]), "those that were never up are removed"
    assert urls[0] not in proxy.http.get("/metrics").text


def test_when_a_node_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made, fixed = nodes.Node("http://a"), nodes.Node("http://b", fixed=True)
    made.found_well({})
    now[0] += nodes.EXPIRY_SECONDS + 1
    expired = [made.expired]
    for node in (made, fixed):
        node.found_down("gone")
    expired += [made.expired, fixed.expired]
    made.registered = now[0]
    assert [*expired, made.expired] == [False, True, False, False], "up, down, named at the start, registered again"


def test_a_node_that_fails_three_times_in_a_row_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    node = nodes.Node("http://a")
    node.found_well({})

    def fail() -> None:
        sent = now[0]
        now[0] += 1
        for _ in range(9):
            node.note_fault("x", sent)

    def up() -> bool:
        return node.up

    for _ in range(nodes.FAULTS - 1):
        fail()
    assert up(), "many that fail together are one"
    node.note_success()
    for _ in range(nodes.FAULTS):
        assert up()
        fail()
    assert not up()
    node.found_well({})
    assert not up()
    now[0] += nodes.BARRED_SECONDS + 1
    node.found_well({})
    assert up()


# Requests that nodes die of


def test_a_request_that_kills_its_nodes_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Suspects()
    one, other = (Asked("POST", CHAT, "", {}, body, "x", {}, None) for body in (b"1", b"2"))
    for url in ("http://a", "http://a", "http://b"):
        known.note(one, url)
    assert (known.deaths(one), known.deaths(other)) == (2, 0)
    known.clear(other)
    assert known.deaths(one) == 2
    known.clear(one)
    assert known.deaths(one) == 0, "a node has answered it"
    known.note(one, "http://a")
    monkeypatch.setattr(suspects, "MEMORY_SECONDS", -1)
    assert known.deaths(one) == 0


TRIES = {(503, ""): 2, (502, ""): 2, (503, "Retry-After: 5"): 3, (429, ""): 3}
"""Status and header of nodes → how many of three are asked: an engine may have died, or has not begun."""


def test_an_engine_that_died_counts_as_a_node_that_died(stack: ExitStack) -> None:
    told = {"error": {"message": "the engine stopped while the request ran"}}
    made: dict[tuple[int, str], list[RawNode]] = {}
    for status, header in TRIES:
        answer = whole(told, status, "application/json", *filter(None, [header]))
        served = models({"id": f"{status}{header}"})
        made[status, header] = [RawNode(**{"": answer, "/v1/models": served}) for _ in range(3)]
    every = [node for some in made.values() for node in some]
    for node in every:
        stack.callback(node.close)
    urls = [node.url for node in every]
    proxy = Running(stack, "", nodes=urls, heartbeat_interval=60)
    for (status, header), count in TRIES.items():
        asked = {**ASK, "model": f"{status}{header}"}
        assert proxy.http.post(CHAT, json=asked).status_code == status
        assert sum(len(node.asked) for node in made[status, header]) == count
        again = proxy.http.post(CHAT, json=asked)
        assert sum(len(node.asked) for node in made[status, header]) == (2 if count == 2 else 6)
        assert again.status_code == (502 if count == 2 else status)


def test_a_client_that_tries_again_kills_no_more_nodes(stack: ExitStack) -> None:
    """SDKs send a request again after a 502; a stream that has begun is not, but its client may."""
    proxy = Running(stack, "abcd", heartbeat_interval=60)
    for node in proxy.nodes:
        node.does.waits_before = 1
    for _ in range(4):
        with proxy.http.stream("POST", CHAT, json=STREAM) as reply:
            lines = reply.iter_lines()
            if reply.status_code == 200:
                assert next(lines)
                next(node for node in proxy.nodes if node.answered and proxy.status(node)["in_flight"]).kill()
            assert "error" in "".join(lines)
    assert sum(node.answered for node in proxy.nodes) == 2
