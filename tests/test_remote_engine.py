"""An engine in a process of its own is the engine."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.front.adapter_loader import unload
from jaxdeploy.engine.front.async_engine import AsyncEngine, EngineStoppedError
from jaxdeploy.engine.front.child import Calls, Commands
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.engine.front.remote import STEP_TIMEOUT, RemoteEngine
from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    RequestError,
    RequestFailedError,
    UnknownAdapterError,
)
from jaxdeploy.messages import FinishReason, Request, StepOutput, TextOptions
from tests.served import until as eventually
from tests.tiny_models import SESSION_LEN, VOCAB, outputs_of, prompt, request, tiny_engine
from tests.tiny_text import generate, joined, tiny_generator

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def remote() -> Iterator[RemoteEngine]:
    """One for all: the process has to import JAX and compile."""
    engine = RemoteEngine(tiny_engine)
    yield engine
    engine.close()
    assert not engine._process.is_alive()


class Echo:
    """An engine without a model: a request gets its prompt, a token a step; ``fails`` after as many steps."""

    limits = RequestLimits(SESSION_LEN, VOCAB)

    def __init__(self, fails: int = 1 << 30) -> None:
        self._left: dict[str, list[int]] = {}
        self._fails = fails
        self._adapters = Adapters()
        self._loader = ThreadPoolExecutor(1)

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._left), adapters=self._adapters.names)

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """``folder`` says what becomes of it."""

        def read() -> None:
            if folder == "the end":
                os._exit(7)
            time.sleep(0.2)
            if folder == "damaged":
                raise CheckpointError(f"adapter={name} is damaged; give another")
            if folder == "odd":
                raise OddError("no luck", 3)
            self._adapters.load(name, folder)

        return self._loader.submit(read)

    def unload_adapter(self, name: str) -> Future[None]:
        return unload(self._adapters, name)

    def add(self, item: Request) -> None:
        if item.adapter is not None:
            self._adapters.named(item.adapter)
        self._left[item.request_id] = list(item.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def wake(self) -> None:
        """It never waits."""

    def step(self) -> list[StepOutput]:
        self._fails -= 1
        if self._fails < 0:
            raise OddError("no luck", 3)
        return [self._output(name) for name in list(self._left)]

    def _output(self, name: str) -> StepOutput:
        token = self._left[name].pop(0)
        if self._left[name]:
            return StepOutput(name, (token,))
        del self._left[name]
        return StepOutput(name, (token,), FinishReason.LENGTH)

    def close(self) -> None:
        """Nothing to free."""


class Thinking(Echo):
    """One that never says anything."""

    def step(self) -> list[StepOutput]:
        time.sleep(0.001)
        return []


class Refusing(Echo):
    """One that fails to add a request that begins with token 1."""

    def add(self, item: Request) -> None:
        if item.prompt_token_ids[0] == 1:
            raise OddError("no luck", 3)
        super().add(item)


class OddError(Exception):
    """One that pickles but does not come back."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)


def refuse(error: Exception) -> EngineLike:
    raise error


def refuse_oddly() -> EngineLike:
    raise OddError("no luck", 3)


def echo(fails: int = 1 << 30) -> EngineLike:
    return Echo(fails)


def collect(engine: RemoteEngine, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {item.request_id: [] for item in requests}
    for item in requests:
        engine.add(item)
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens


def without_logprobs(output: StepOutput) -> StepOutput:
    return replace(output, logprobs=())


def logprobs_of(outputs: list[StepOutput]) -> list[tuple[float, float]]:
    """Each token with its logprob: the chosen ones, then the likeliest."""
    reported = [one for output in outputs for one in output.logprobs]
    return [pair for one in reported for pair in ((one.token_id, one.logprob), *one.top)]


def test_its_outputs_are_those_of_an_engine(remote: RemoteEngine) -> None:
    items = [request(f"{n}", prompt(n), temperature=n % 2, seed=n, logprobs=n % 3 or None) for n in (1, 20, 33, 50)]
    expected = outputs_of(tiny_engine(), items)
    seen: dict[str, list[StepOutput]] = {item.request_id: [] for item in items}
    for item in items:
        remote.add(item)
    while remote.has_work:
        for output in remote.step():
            seen[output.request_id].append(output)
    for name, outputs in expected.items():
        assert [without_logprobs(one) for one in seen[name]] == [without_logprobs(one) for one in outputs]
        assert_allclose(logprobs_of(seen[name]), logprobs_of(outputs), atol=2e-5)  # in another batch rounding differs


def test_with_text_around_it(remote: RemoteEngine) -> None:
    items = [replace(request(f"{n}", prompt(n)), text=TextOptions(("never",))) for n in (5, 20)]
    seen, expected = generate(tiny_generator(remote), items), generate(tiny_generator(), items)
    assert {name: joined(outputs) for name, outputs in seen.items()} == {
        name: joined(outputs) for name, outputs in expected.items()
    }


def test_an_asynchronous_engine_over_it(remote: RemoteEngine) -> None:
    expected = {f"{n}": joined(generate(tiny_generator(), [request("a", prompt(n))])["a"]) for n in (5, 9)}

    async def ask(engine: AsyncEngine, length: int) -> tuple[str, list[int]]:
        return joined([output async for output in engine.generate(request(f"{length}", prompt(length)))])

    async def both(engine: AsyncEngine) -> Any:
        return await asyncio.wait_for(asyncio.gather(ask(engine, 5), ask(engine, 9)), 60)

    generator = tiny_generator(remote)
    generator.close = lambda: None  # type: ignore[method-assign]
    engine = AsyncEngine(generator)
    assert asyncio.run(both(engine)) == [expected["5"], expected["9"]]
    engine.close()


def test_bad_requests_raise_at_once(remote: RemoteEngine) -> None:
    with pytest.raises(ContextLengthError, match="session_len=128"):
        remote.add(request("a", prompt(SESSION_LEN)))
    with pytest.raises(RequestError, match="prompt_token_ids must be between 0 and 95"):
        remote.add(request("a", [VOCAB]))
    remote.add(request("a", prompt(5)))
    with pytest.raises(RequestError, match="request_id=a is in use"):
        remote.add(request("a", prompt(5)))
    remote.abort("a")
    remote.abort("never was")
    assert not remote.has_work


def test_outputs_of_what_was_aborted_reach_nobody() -> None:
    """Not even one who has its name now."""
    engine = RemoteEngine(echo)
    for round_ in range(20):
        engine.add(Request("a", (1,) * 50))
        engine.abort("a")
        assert collect(engine, [Request("a", (2, 3, 4, round_))]) == {"a": [2, 3, 4, round_]}
    engine.close()


def test_how_it_stands() -> None:
    """Also when nothing comes out: what was aborted runs no more."""
    engine = RemoteEngine(Thinking)
    assert engine.stats == EngineStats()
    for name in "ab":
        engine.add(Request(name, (1,)))
    assert until(engine, lambda: engine.stats.running == 2)
    engine.abort("a")
    engine.abort("b")
    assert not engine.has_work
    assert until(engine, lambda: engine.stats.running == 0)
    assert engine._process.pid is not None
    os.kill(engine._process.pid, signal.SIGSTOP)
    engine.add(Request("a", (1,)))
    assert engine.stats == EngineStats(waiting=1), "a process that hangs does not mention it"
    os.kill(engine._process.pid, signal.SIGCONT)
    engine.abort("a")
    assert engine.step() == []
    engine.close()


def test_a_request_that_the_process_refuses_ends_with_the_reason() -> None:
    """A fault of any kind in its ``add``; the others and the process go on."""
    here, there = multiprocessing.Pipe()
    engine = Refusing()
    commands = Commands(there, engine, Calls(engine))
    for name, tokens in (("bad", (1, 2)), ("good", (2, 3))):
        here.send(("add", Request(name, tokens)))
    assert commands.handle()
    assert commands.refused == [StepOutput("bad", (), FinishReason.ERROR)]
    assert isinstance(commands.refused[0].error, RequestFailedError)
    assert [output.request_id for output in engine.step()] == ["good"]


def test_a_refused_request_that_is_aborted_says_nothing_to_the_next_of_its_name() -> None:
    here, there = multiprocessing.Pipe()
    engine = Refusing()
    commands = Commands(there, engine, Calls(engine))
    for command in (("add", Request("a", (1, 2))), ("abort", "a"), ("add", Request("a", (2, 3)))):
        here.send(command)
    assert commands.handle()
    assert (commands.refused, commands.aborted) == ([], ["a"])
    assert [output.request_id for output in engine.step()] == ["a"]


def test_looking_loses_no_output() -> None:
    engine, tokens = RemoteEngine(echo), list[int]()
    engine.add(Request("a", tuple(range(50))))
    while engine.has_work:
        assert engine.stats.running <= 1
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == list(range(50))
    engine.close()


def test_more_than_the_pipe_holds() -> None:
    """Both sides write before they read."""
    engine = RemoteEngine(echo)
    items = [Request(f"{n}", tuple((n + k) % VOCAB for k in range(60))) for n in range(600)]
    assert collect(engine, items) == {item.request_id: list(item.prompt_token_ids) for item in items}
    engine.close()


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match="tp=3 does not fit"):
        RemoteEngine(partial(refuse, ConfigError("tp=3 does not fit")))
    with pytest.raises(EngineDiedError, match="OddError: no luck"):
        RemoteEngine(refuse_oddly)


def step_until_it_ends(engine: RemoteEngine) -> None:
    for _ in range(10_000):
        engine.step()


@pytest.mark.parametrize(
    "how", ["killed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fails", "interrupted"))]
)
def test_the_end_of_the_process(how: str) -> None:
    engine = RemoteEngine(partial(echo, 5) if how == "fails" else echo)
    engine.add(Request("a", (1,) * 90))
    assert engine._process.pid is not None
    if how == "interrupted":  # a terminal sends it to both; the process leaves it to its owner
        os.kill(engine._process.pid, signal.SIGINT)
        assert until(engine, lambda: not engine.has_work)
    else:
        if how == "killed":
            os.kill(engine._process.pid, signal.SIGKILL)
        message = {"fails": "OddError: no luck", "killed": "ended with exit code -9"}[how]
        with pytest.raises(EngineDiedError, match=message):
            step_until_it_ends(engine)
    engine.close()
    engine.close()


def until(engine: RemoteEngine, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        engine.step()
    return condition()


def test_who_asks_how_a_dead_process_stands_hears_of_it() -> None:
    remote = RemoteEngine(echo)
    engine = AsyncEngine(tiny_generator(remote))
    assert remote._process.pid is not None
    os.kill(remote._process.pid, signal.SIGKILL)
    remote._process.join()
    with pytest.raises(EngineDiedError, match="ended with exit code -9"):
        asyncio.run(asyncio.wait_for(engine.stats(), 30))
    engine.close()


def test_who_waits_for_a_dead_process_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    engine = AsyncEngine(tiny_generator(RemoteEngine(partial(echo, 5))))

    async def ask() -> None:
        async for _ in engine.generate(request("a", (1,) * 90)):
            pass

    with pytest.raises(EngineStoppedError):
        asyncio.run(asyncio.wait_for(ask(), 30))
    assert "OddError: no luck" in caplog.text
    engine.close()


def answered(engine: RemoteEngine, call: Future[None]) -> None:
    assert until(engine, call.done)
    call.result(0)


def test_adapters_come_and_go_while_others_run() -> None:
    engine = RemoteEngine(Thinking)
    engine.add(Request("a", (1,)))
    with pytest.raises(UnknownAdapterError, match="adapter='x' is not loaded; none is loaded; load it first"):
        engine.add(Request("b", (1,), adapter="x"))
    loading = engine.load_adapter("x", "fine")
    begun = time.monotonic()
    assert engine.step() == [], "the answer wakes whoever waits"
    assert time.monotonic() - begun < STEP_TIMEOUT - 0.05
    answered(engine, loading)
    assert engine.stats == EngineStats(running=1, adapters=("x",))
    engine.add(Request("b", (1,), adapter="x"))
    assert until(engine, lambda: engine.stats.running == 2)
    answered(engine, engine.unload_adapter("x"))
    assert engine.stats == EngineStats(running=2)
    with pytest.raises(UnknownAdapterError, match="adapter='x' is not loaded"):
        answered(engine, engine.unload_adapter("x"))
    engine.close()


def test_an_idle_engine_answers_too() -> None:
    engine = RemoteEngine(echo)
    names = [f"{number}" for number in range(5)]
    calls = [engine.load_adapter(name, "fine") for name in names]
    given_up = engine.load_adapter("given up", "fine")
    assert given_up.cancel()
    damaged, odd = engine.load_adapter("y", "damaged"), engine.load_adapter("y", "odd")
    waits = engine.has_work
    for call in calls:
        answered(engine, call)
    with pytest.raises(CheckpointError, match="adapter=y is damaged; give another"):
        answered(engine, damaged)
    with pytest.raises(EngineDiedError, match="OddError: no luck"):
        answered(engine, odd)
    assert engine.stats.adapters == (*names, "given up")
    assert (waits, engine.has_work) == (True, False)
    assert collect(engine, [Request("a", (1, 2), adapter="3")]) == {"a": [1, 2]}
    engine.close()


def test_a_request_that_meets_the_unloading_of_its_adapter_ends() -> None:
    """And the engine does not."""
    engine = RemoteEngine(echo)
    answered(engine, engine.load_adapter("x", "fine"))
    unloading = engine.unload_adapter("x")
    engine.add(Request("a", (1, 2), adapter="x"))
    outputs = list[StepOutput]()
    while not outputs:
        outputs = engine.step()
    assert outputs == [StepOutput("a", (), FinishReason.ERROR)]
    answered(engine, unloading)
    assert not engine.has_work
    engine.close()


@pytest.mark.parametrize("how", ["dies", pytest.param("closed", marks=pytest.mark.slow)])
def test_calls_fail_when_the_process_ends(how: str) -> None:
    engine = RemoteEngine(echo)
    calls = [engine.load_adapter("x", "fine"), engine.load_adapter("y", "the end")]
    if how == "closed":
        engine.close()
        assert not engine.has_work
    else:
        with pytest.raises(EngineDiedError, match="ended with exit code 7"):
            step_until_it_ends(engine)
    with pytest.raises(EngineDiedError):
        calls[1].result(0)
    engine.close()


def test_loading_through_the_asynchronous_engine() -> None:
    engine = AsyncEngine(tiny_generator(RemoteEngine(echo)))

    async def ask(name: str) -> list[int]:
        asked = replace(request("a", (1, 2, 3)), adapter=name)
        return [token async for output in engine.generate(asked) for token in output.token_ids]

    async def talk() -> None:
        with pytest.raises(UnknownAdapterError):
            await ask("x")
        with pytest.raises(CheckpointError):
            await engine.load_adapter("x", "damaged")
        loading = asyncio.create_task(engine.load_adapter("x", "fine"))
        assert (await engine.stats()).adapters == (), "others are not held up"
        await loading
        assert (await engine.stats()).adapters == ("x",)
        assert await ask("x") == [1, 2, 3]
        await engine.unload_adapter("x")
        with pytest.raises(UnknownAdapterError):
            await engine.unload_adapter("x")
        with pytest.raises(EngineDiedError, match="ended with exit code 7"):
            await engine.load_adapter("x", "the end")
        with pytest.raises(EngineStoppedError):
            await engine.load_adapter("x", "fine")

    asyncio.run(asyncio.wait_for(talk(), 60))
    engine.close()


SLOW_START = """
import threading, time, sys
from functools import partial
from jaxdeploy.engine.front.remote import RemoteEngine

if __name__ == "__main__":
    engines = []
    start = lambda: engines.append(RemoteEngine(partial(time.sleep, 600), wait=False))
    start()
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    print(*(engine._process.pid for engine in engines), flush=True)
    engines[0].ready(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_no_process_outlives_its_owner(tmp_path: Path, number: int) -> None:
    """While the engine is built, whichever thread started it."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_START)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        owner.send_signal(number)
    assert len(pids) == 2
    assert eventually(lambda: not any(map(alive, pids))), "a process has no owner"


def alive(pid: int) -> bool:
    """Whether the process exists and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SERVES = """
from jaxdeploy import ServerConfig, serve
from jaxdeploy.bundled import bundled_model
serve(bundled_model(), server_config=ServerConfig(server_name="127.0.0.1", server_port=0))
"""
STARTS = "from jaxdeploy.engine.front.remote import RemoteEngine; RemoteEngine(print)"


@pytest.mark.parametrize("call", [STARTS, pytest.param(SERVES, marks=pytest.mark.slow)])
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path, call: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(call)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert ran.returncode == 1
    assert ran.stderr.count("Traceback") == 1
    assert "put the call under `if __name__ == '__main__':`" in ran.stderr.splitlines()[-1]
