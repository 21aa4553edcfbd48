"""Many callers, one engine thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any, cast

import pytest

from jaxdeploy.engine.front.async_engine import AsyncEngine, EngineStoppedError
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import ContextLengthError, RequestError
from jaxdeploy.messages import FinishReason, Request, TextOutput
from tests.tiny_models import SESSION_LEN, prompt, request
from tests.tiny_text import active_blocks, generate, joined, tiny_generator

LENGTHS = (1, 20, 33, 64, 90)
ENDLESS = {"max_new_tokens": SESSION_LEN}


def text_request(name: str, length: int, **sampling: Any) -> Request:
    return request(name, prompt(length), **sampling)


def mixed() -> list[Request]:
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    return [text_request(str(length), length, **(sampled if length % 2 else {})) for length in LENGTHS]


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    running = AsyncEngine(tiny_generator())
    yield running
    if running.healthy:
        assert until(lambda: not running.generator.has_work)
        assert active_blocks(running.generator) == 0
    running.close()
    assert not running.healthy


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes to hold: what another thread is to do, it does soon."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


async def collect(engine: AsyncEngine, item: Request) -> list[TextOutput]:
    async with asyncio.timeout(60):
        return [output async for output in engine.generate(item)]


@pytest.fixture
def aborted(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the requests that the generator was told to drop."""
    names: list[str] = []
    abort = engine.generator.abort

    def noted(name: str) -> None:
        names.append(name)
        abort(name)

    monkeypatch.setattr(engine.generator, "abort", noted)
    return names


async def first(outputs: AsyncIterator[TextOutput]) -> TextOutput:
    return await anext(outputs)


def test_concurrent_callers_get_what_they_would_get_alone(engine: AsyncEngine) -> None:
    async def everyone() -> list[list[TextOutput]]:
        return await asyncio.gather(*(collect(engine, item) for item in mixed()))

    expected = generate(tiny_generator(), mixed())
    for length, outputs in zip(LENGTHS, asyncio.run(everyone()), strict=True):
        assert joined(outputs) == joined(expected[str(length)])
        assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_callers_on_loops_of_their_own(engine: AsyncEngine) -> None:
    results: dict[str, list[TextOutput]] = {}

    def call(item: Request) -> None:
        results[item.request_id] = asyncio.run(collect(engine, item))

    threads = [threading.Thread(target=call, args=(item,)) for item in mixed()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = generate(tiny_generator(), mixed())
    assert {name: joined(outputs) for name, outputs in results.items()} == {
        name: joined(outputs) for name, outputs in expected.items()
    }


def test_leaving_early_aborts_and_frees(engine: AsyncEngine, aborted: list[str]) -> None:
    async def leave() -> None:
        async with aclosing(cast(Any, engine.generate(text_request("a", 20, **ENDLESS)))) as outputs:
            async for _ in outputs:
                break

    asyncio.run(leave())
    assert until(lambda: aborted == ["a"])
    assert until(lambda: not engine.generator.has_work)
    assert active_blocks(engine.generator) == 0


def test_cancelling_a_caller_aborts_its_request(engine: AsyncEngine, aborted: list[str]) -> None:
    async def cancel() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in engine.generate(text_request("a", 1, **ENDLESS)):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert until(lambda: aborted == ["a"])
    assert until(lambda: not engine.generator.has_work)


def test_a_caller_whose_loop_is_gone_harms_nobody(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    outputs = engine.generate(text_request("a", 20))
    loop.run_until_complete(first(outputs))
    loop.close()
    assert until(lambda: not engine.generator.has_work)
    assert joined(asyncio.run(collect(engine, text_request("b", 20))))[1]
    assert engine.healthy


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (text_request("bad", SESSION_LEN), ContextLengthError),
        (text_request("good", 5), RequestError),
        (request("bad", cast(Any, ["text"])), RequestError),
    ],
)
def test_a_bad_request_fails_its_caller_only(engine: AsyncEngine, item: Request, error: type[Exception]) -> None:
    async def both() -> list[TextOutput]:
        good = engine.generate(text_request("good", 20, max_new_tokens=100))
        outputs = [await first(good)]
        with pytest.raises(error):
            await collect(engine, item)
        return outputs + [output async for output in good]

    expected = joined(generate(tiny_generator(), [text_request("good", 20, max_new_tokens=100)])["good"])
    assert joined(asyncio.run(both())) == expected


def test_how_it_stands(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.generator.step

    def until_it_speaks() -> list[TextOutput]:
        """Else the reply might be over before anybody asks."""
        if outputs := step():
            monkeypatch.setattr(engine.generator, "step", pause)
        return outputs

    def pause() -> list[TextOutput]:
        time.sleep(0.001)
        return []

    monkeypatch.setattr(engine.generator, "step", until_it_speaks)

    async def ask() -> tuple[EngineStats, EngineStats]:
        outputs = cast(Any, engine.generate(text_request("a", 20, **ENDLESS)))
        async with aclosing(outputs):
            await anext(outputs)
            during = await engine.stats()
        while (after := await engine.stats()).running:
            await asyncio.sleep(0)
        return during, after

    during, after = asyncio.run(asyncio.wait_for(ask(), 20))
    assert (during.running, during.waiting, during.prompt_tokens) == (1, 0, 20)
    assert during.active_blocks >= 2
    assert during.generated_tokens >= 1
    assert (after.active_blocks, after.cached_blocks + after.active_blocks < after.blocks) == (0, True)
    engine.close()
    with pytest.raises(EngineStoppedError):
        asyncio.run(engine.stats())


def test_abort_by_name(engine: AsyncEngine) -> None:
    async def abort() -> None:
        outputs = engine.generate(text_request("a", 20, **ENDLESS))
        await first(outputs)
        await engine.abort("a")
        with pytest.raises(EngineStoppedError, match="request a was aborted"):
            async for _ in outputs:
                pass

    asyncio.run(abort())
    assert engine.healthy


def test_closing_fails_what_runs() -> None:
    engine = AsyncEngine(tiny_generator())

    async def close() -> None:
        running = [engine.generate(text_request(name, 20, **ENDLESS)) for name in "ab"]
        for outputs in running:
            await first(outputs)
        engine.close()
        for outputs in running:
            with pytest.raises(EngineStoppedError, match="the engine stopped while the request ran; try again"):
                async for _ in outputs:
                    pass
        with pytest.raises(EngineStoppedError, match="the engine has stopped; restart it"):
            await collect(engine, text_request("c", 5))

    asyncio.run(close())
    assert not engine.healthy
    engine.close()


class StubbornGenerator:
    """``step`` waits until it is told to go on, or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.failure = failure
        self.has_work = False

    def submit(self, item: Request) -> None:
        self.has_work = True

    def step(self) -> list[TextOutput]:
        self.entered.set()
        assert self.go_on.wait(20)
        if self.failure is not None:
            raise self.failure
        return []

    def abort(self, request_id: str) -> None:
        self.has_work = False

    def wake(self) -> None:
        """It is told by other means."""

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("failure", [None, RuntimeError("out of luck")], ids=["closed", "failed"])
def test_nobody_waits_for_ever(failure: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that come while the last step runs fail too, whether the engine was closed or its step failed."""
    generator = StubbornGenerator(failure)
    engine = AsyncEngine(cast(Generator, generator))

    async def late() -> list[Any]:
        tasks = [asyncio.create_task(collect(engine, text_request("first", 5)))]
        await asyncio.to_thread(generator.entered.wait, 20)
        if failure is None:
            closing = threading.Thread(target=engine.close)
            closing.start()
            assert until(lambda: not engine._commands.empty())
        tasks.append(asyncio.create_task(collect(engine, text_request("late", 5))))
        await asyncio.sleep(0.01)
        generator.go_on.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    assert [type(error) for error in asyncio.run(late())] == [EngineStoppedError] * 2
    engine.close()
    assert ("out of luck" in caplog.text) == (failure is not None)
