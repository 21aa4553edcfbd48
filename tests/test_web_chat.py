"""The web chat without its page: talking with a model behind a real server, and what is told of failures."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse

from jaxdeploy.api.client import ServerError
from jaxdeploy.chat.session import ChatReply
from jaxdeploy.cli import main
from jaxdeploy.config import GenerationConfig, ServerConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.messages import FinishReason
from jaxdeploy.server.local import LocalServer
from jaxdeploy.server.service import ModelService
from jaxdeploy.web_chat import login
from jaxdeploy.web_chat.dialogue import Dialogue, Manner, add, short_name
from jaxdeploy.web_chat.login import LoginGate
from jaxdeploy.web_chat.remote_model import RemoteModel
from jaxdeploy.web_chat.security import PageRules
from jaxdeploy.web_chat.whole_text import WholeText
from tests.served import NAME, SESSION_LEN, RunningServer, demo_engine, running, until

SIX_BY_SEVEN = "What is 6 times 7?"
GREEDY = Manner(gen_config=GenerationConfig(temperature=0.0, max_new_tokens=40))
ENDLESS = Manner(gen_config=GenerationConfig(temperature=0.0, max_new_tokens=200, ignore_eos=True))


def talk(server: RunningServer, work: Callable[[RemoteModel], Awaitable[None]], api_key: str | None = None) -> None:
    """Do ``work`` with the model of ``server``."""

    async def with_model() -> None:
        model = RemoteModel(server.url, api_key)
        try:
            await work(model)
        finally:
            await model.close()

    asyncio.run(with_model())


async def whole(steps: AsyncGenerator[None]) -> int:
    """Let a reply be written to its end; how often there was something to show."""
    return len([None async for _ in steps])


async def some_of(dialogue: Dialogue, steps: AsyncGenerator[None]) -> None:
    """Let a reply begin."""
    async for _ in steps:
        if dialogue.turns[-1].reply.num_tokens > 3:
            return
    raise AssertionError("it ended first")


async def idle(server: RunningServer) -> bool:
    return await asyncio.to_thread(until, server.idle)


def test_a_reply_grows_and_is_remembered(server: RunningServer) -> None:
    async def work(model: RemoteModel) -> None:
        assert model.name == NAME
        dialogue = Dialogue()
        lengths, figures = [], []
        async for _ in dialogue.ask(model, "My name is Anna.", ENDLESS):
            lengths.append(len(dialogue.turns[0].reply.text))
            figures.append(dialogue.figures)
        assert figures[0] == "waiting for the first token"
        assert len(set(lengths)) > 2, "it is shown while it is written"
        assert not dialogue.busy
        del dialogue.turns[:]
        await whole(dialogue.ask(model, "My name is Anna.", GREEDY))
        await whole(dialogue.ask(model, "What is my name?", GREEDY))
        assert [turn.said for turn in dialogue.turns] == ["My name is Anna.", "What is my name?"]
        assert "Anna" in dialogue.turns[1].reply.text
        assert re.fullmatch(r"\d+ tokens · TTFT \d+\.\d\d s · \d+\.\d tok/s", dialogue.figures)

    talk(server, work)


def test_stopping_keeps_what_there_is(server: RunningServer) -> None:
    async def work(model: RemoteModel) -> None:
        dialogue, other = Dialogue(), Dialogue()
        steps, others = dialogue.ask(model, SIX_BY_SEVEN, ENDLESS), other.ask(model, SIX_BY_SEVEN, ENDLESS)
        await some_of(dialogue, steps)
        await some_of(other, others)
        assert dialogue.user != other.user
        await dialogue.stop()
        await whole(steps)
        assert dialogue.turns[0].reply.finish_reason is FinishReason.ABORT
        assert dialogue.figures.endswith(" · stopped")
        await whole(others)
        assert other.turns[0].reply.num_tokens == 200, "another's reply goes on"
        assert await idle(server)

    talk(server, work)


def test_a_browser_that_leaves_ends_its_reply(server: RunningServer) -> None:
    async def work(model: RemoteModel) -> None:
        dialogue = Dialogue()
        steps = dialogue.ask(model, SIX_BY_SEVEN, ENDLESS)
        await some_of(dialogue, steps)
        assert not await asyncio.to_thread(server.idle)
        await steps.aclose()
        assert await idle(server)
        assert dialogue.turns[0].reply.num_tokens < 200

    talk(server, work)


def test_asking_again_and_taking_back(server: RunningServer) -> None:
    async def work(model: RemoteModel) -> None:
        dialogue = Dialogue()
        for said in ("Hi!", SIX_BY_SEVEN, "And 2 times 3?"):
            await whole(dialogue.ask(model, said, GREEDY))
        before = [turn.reply.text for turn in dialogue.turns]
        await whole(dialogue.again(model, 1, GREEDY))
        assert [turn.reply.text for turn in dialogue.turns] == before[:2]
        await whole(dialogue.again(model, 5, GREEDY))
        assert len(dialogue.turns) == 2
        assert await dialogue.undo(1) == SIX_BY_SEVEN
        assert [turn.said for turn in dialogue.turns] == ["Hi!"]
        await dialogue.clear()
        assert dialogue == Dialogue(user=dialogue.user, _writing=dialogue._writing)

    talk(server, work)


def test_who_asks_meanwhile_stops_the_reply(server: RunningServer) -> None:
    async def work(model: RemoteModel) -> None:
        dialogue = Dialogue()
        first = dialogue.ask(model, "Hi!", ENDLESS)
        await some_of(dialogue, first)
        await whole(dialogue.ask(model, SIX_BY_SEVEN, GREEDY))
        await whole(first)
        assert [turn.reply.finish_reason for turn in dialogue.turns] == [FinishReason.ABORT, FinishReason.STOP]

    talk(server, work)


def test_too_long_a_conversation(server: RunningServer) -> None:
    async def work(model: RemoteModel) -> None:
        dialogue = Dialogue()
        await whole(dialogue.ask(model, "word " * SESSION_LEN, GREEDY))
        assert dialogue.error.startswith("This conversation is too long for the model: prompt of ")
        assert dialogue.unsent == "word " * SESSION_LEN, "what was typed is not lost"
        assert dialogue.turns == []
        await whole(dialogue.ask(model, SIX_BY_SEVEN, GREEDY))
        assert dialogue.error == dialogue.unsent == ""
        assert "42" in dialogue.turns[0].reply.text

    talk(server, work)


def test_a_server_that_refuses(engine: AsyncEngine) -> None:
    async def without_key(model: RemoteModel) -> None:
        del model._http.headers["Authorization"]
        assert "wants an API key that this page does not have" in await error_of(model)

    async def one_too_many(model: RemoteModel) -> None:
        dialogue = Dialogue()
        steps = dialogue.ask(model, SIX_BY_SEVEN, ENDLESS)
        await some_of(dialogue, steps)
        assert re.search(r"too much to do just now; try again in \d+ s\.", await error_of(model))
        await steps.aclose()

    async def other_model(model: RemoteModel) -> None:
        model.name = "other"
        assert "'other' is not served here" in await error_of(model)

    with running(engine, api_keys=["k"], most=1) as server:
        talk(server, without_key, "k")
        talk(server, one_too_many, "k")
        assert until(server.idle)
        talk(server, other_model, "k")


def test_a_server_that_is_gone(engine: AsyncEngine) -> None:
    with pytest.raises(ServerError, match="cannot be reached"):
        RemoteModel("http://127.0.0.1:1")
    with running(engine) as server:

        async def work(model: RemoteModel) -> None:
            await asyncio.to_thread(server.close)
            assert "does not answer" in await error_of(model)

        talk(server, work)


async def error_of(model: RemoteModel) -> str:
    dialogue = Dialogue()
    await whole(dialogue.ask(model, SIX_BY_SEVEN, GREEDY))
    assert (dialogue.turns, dialogue.unsent) == ([], SIX_BY_SEVEN)
    return dialogue.error


class Script:
    """A model that says ``pieces`` and remembers what it was asked."""

    def __init__(self, *pieces: Mapping[str, Any] | Exception) -> None:
        self.pieces = pieces
        self.asked: list[Sequence[Mapping[str, str]]] = []

    async def events(
        self, messages: Sequence[Mapping[str, str]], gen_config: GenerationConfig, user: str
    ) -> AsyncGenerator[dict[str, Any]]:
        self.asked.append(messages)
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield {"choices": [{"delta": piece}]}


def test_thoughts_are_not_sent_back() -> None:
    model = Script({"reasoning_content": "Hm. "}, {"reasoning": "Yes."}, {"content": "42"})
    dialogue = Dialogue()
    manner = Manner("Be brief.")
    asyncio.run(whole(dialogue.ask(model, "Q", manner)))
    asyncio.run(whole(dialogue.ask(model, "Why?", Manner(" "))))
    reply = dialogue.turns[0].reply
    assert (reply.thought, reply.text, reply.num_tokens) == ("Hm. Yes.", "42", 3)
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "42"}]
    assert model.asked[0] == [{"role": "system", "content": "Be brief."}, said[0]]
    assert model.asked[1] == [*said, {"role": "user", "content": "Why?"}]


def test_a_failure_on_the_way_keeps_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    dialogue = Dialogue()
    asyncio.run(whole(dialogue.ask(Script({"content": "4"}, ServerError("broken")), "Q", GREEDY)))
    assert (dialogue.turns[0].reply.text, dialogue.error) == ("4", "The server failed: broken.")
    asyncio.run(whole(dialogue.ask(Script({"content": "4"}, KeyError("x")), "Q", GREEDY)))
    assert dialogue.error == "The web chat failed; its log says more."
    assert "KeyError" in caplog.text


def test_the_server_counts_tokens_best() -> None:
    reply = ChatReply()
    add(reply, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    add(reply, {"choices": [{"delta": {"content": "ab"}, "finish_reason": "length"}], "usage": None})
    assert (reply.num_tokens, reply.finish_reason) == (1, FinishReason.LENGTH)
    add(reply, {"choices": [], "usage": {"completion_tokens": 7}})
    assert (reply.text, reply.num_tokens) == ("ab", 7)


def asked(app: Any, *requests: tuple[str, str], **options: Any) -> list[httpx2.Response]:
    """The answers of an ASGI application to requests, one after the other."""

    async def work() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app, client=options.pop("client", ("127.0.0.1", 1)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://page") as http:
            return [await http.request(method, path, **options) for method, path in requests]

    return asyncio.run(work())


def test_what_a_page_may_not() -> None:
    app = PageRules(PlainTextResponse("page"))
    page, upload, fetched, run, docs = asked(
        app,
        *(("GET", "/"), ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/file=http://elsewhere")),
        *(("POST", "/gradio_api/vibe-code/"), ("GET", "/gradio_api/openapi.json")),
    )
    assert page.text == "page"
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert {answer.status_code for answer in (upload, fetched, run, docs)} == {404}


async def login_page(scope: Any, receive: Any, send: Any) -> None:
    """Logs in who brings the key ``right``."""
    form = await StarletteRequest(scope, receive).body()
    await PlainTextResponse("", 200 if b"right" in form else 400)(scope, receive, send)


def test_nothing_but_the_login_is_open() -> None:
    gate = LoginGate(login_page, lambda connection: connection.cookies.get("login") == "yes")
    paths = ("/config", "/gradio_api/startup-events", "/gradio_api/queue/data", "/login/x", "/gradio_api/cancel")
    closed = [("GET", path) for path in paths]
    assert {answer.status_code for answer in asked(gate, *closed)} == {401}
    assert {answer.status_code for answer in asked(gate, *closed, headers={"Cookie": "login=yes"})} == {400}
    assert {answer.status_code for answer in asked(gate, ("GET", "/"), ("GET", "/assets/x.js"))} == {400}


def test_wrong_logins_are_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(login, "time", SimpleNamespace(monotonic=lambda: now[0]))
    gate = LoginGate(login_page, lambda connection: False)

    def guess(text: str = "wrong", host: str = "10.0.0.1", count: int = 1) -> list[int]:
        answers = asked(gate, *[("POST", "/login")] * count, content=text, client=(host, 1))
        assert all(answer.status_code != 429 or int(answer.headers["retry-after"]) > 0 for answer in answers)
        return [answer.status_code for answer in answers]

    assert guess(count=100) == [400] * login.FREE + [429] * (100 - login.FREE)
    assert guess("right") == [429], "a right key has to wait too: else a guess would be told"
    assert guess("right", host="10.0.0.2") == [200], "others do not"
    waits = []
    for _ in range(9):
        begun = now[0]
        while guess() == [429]:
            now[0] += 0.5
        waits.append(now[0] - begun)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now[0] += 60
    assert guess("right") == [200]
    assert guess() == [400], "a right key begins anew"
    assert guess(host="2001:db8::1", count=login.FREE) == [400] * login.FREE
    assert guess(host="2001:db8::ffff:2") == [429], "one who has a network of IPv6 is one"
    assert asked(gate, ("POST", "/login"), content="x" * 10_000, client=("10.0.0.9", 1))[0].status_code == 413


def test_wrong_logins_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "MAX_PER_MINUTE", 50)
    monkeypatch.setattr(login, "time", SimpleNamespace(monotonic=lambda: 600.0))
    attempts = login.Attempts()
    for number in range(9000):
        attempts.note(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(attempts._wrong) == login.MAX_ADDRESSES
    assert attempts.wait("10.9.9.9") == 60, "many addresses together guess no faster"


HALF = "\\ud83d"
"""Half an emoji as JSON has it."""


@pytest.mark.parametrize(
    ("body", "arrives"),
    [
        (f'{{"a": "{HALF}"}}', {"a": "\ufffd"}),
        (f'{{"{HALF}": ["{HALF}\\ude00", "\\ude00"]}}', {"\ufffd": ["\U0001f600", "\ufffd"]}),
        ('{"a": "\\\\ud83d é"}', {"a": "\\ud83d é"}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_half_an_emoji_does_not_reach_the_page(body: str, arrives: Any) -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse(await StarletteRequest(scope, receive).body())(scope, receive, send)

    kind = {"Content-Type": "application/json; charset=utf-8"}
    (answer,) = asked(WholeText(echo), ("POST", "/"), content=body.encode(), headers=kind)
    assert answer.json() == arrives
    wrong = [b'"\xff', b"[" * 100_000 + HALF.encode(), HALF.encode()]
    assert [asked(WholeText(echo), ("POST", "/"), content=each, headers=kind)[0].status_code for each in wrong] == (
        [400] * 3
    )


def test_half_an_emoji_in_a_dialogue() -> None:
    model = Script({"content": "4\ud83d"}, {"content": "\ude002"})
    dialogue = Dialogue()
    asyncio.run(whole(dialogue.ask(model, "Q\ud83d", Manner("Be \ude00 brief."))))
    asyncio.run(whole(dialogue.ask(model, "R", GREEDY)))
    assert not dialogue.error
    json.dumps([*model.asked, dialogue.turns[0].said, dialogue.turns[0].reply.text], ensure_ascii=False).encode()
    assert model.asked[0][0]["content"] == "Be \ufffd brief."
    assert dialogue.turns[0].said == "Q\ufffd"


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("/srv/models/Qwen2.5-7B/", "Qwen2.5-7B"),
        ("./models/x", "x"),
        ("a/b/c", "c"),
        ("C:\\models\\x", "x"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("demo", "demo"),
        ("/", "/"),
    ],
)
def test_a_model_is_shown_by_its_name(model: str, shown: str) -> None:
    assert short_name(model) == shown


def test_the_server_of_this_process_wants_its_key() -> None:
    local = LocalServer(ModelService(demo_engine(), NAME, 4), ServerConfig(api_keys=["of the page"]))
    assert httpx2.get(f"{local.url}/v1/models").status_code == 401
    assert RemoteModel(local.url, local.api_key).name == NAME
    local.close()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(local.url)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--allow-origins", "*"], "allow_origins is a flag of api_server"),
        (["http://127.0.0.1:1", "--session-len", "64"], "session_len is a flag of a MODEL"),
        (["http://127.0.0.1:1", "--reasoning-parser", "think"], "reasoning_parser is a flag of a MODEL"),
        (["http://127.0.0.1:1", "--chat-template", "qwen"], "chat_template is a flag of a MODEL"),
        (["--api-key", "k"], "api_key is for a server at URL"),
    ],
)
def test_flags_that_would_do_nothing(capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    assert main(["serve", "gradio", *flags]) == 2
    assert says in capsys.readouterr().err


def test_without_its_packages_the_web_chat_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['gradio'] = None; from jaxdeploy.cli import main"
    code = f"{hidden}; sys.exit(main(['serve', 'gradio']))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: the web chat needs gradio, which is missing; pip install 'jaxdeploy[gradio]'\n"
