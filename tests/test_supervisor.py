"""An engine whose process dies is restarted, and each request is finished or ended exactly once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.front import supervisor
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.engine.front.supervisor import MAX_DEATHS, Supervisor
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import CheckpointError, ConfigError, RequestError, UnknownAdapterError
from jaxdeploy.messages import FinishReason, Request, SpeculationCounts, StepOutput
from tests.test_remote_engine import Echo

TOKEN = (7,)


class FakeProcess:
    """What ``RemoteEngine`` is to a supervisor. The test decides what happens; ``fault`` is why it died."""

    def __init__(self, fleet: Fleet, *, wait: bool) -> None:
        self.limits = RequestLimits(100, 10)
        self.stats_now = EngineStats(adapters=fleet.adapters)
        self.added: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.calls: list[tuple[str, str | Path | None]] = []
        self.built = wait
        self.closed = False
        self.outputs: list[StepOutput] = []
        self.fault: Exception | None = None
        self.has_work = False

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def ready(self, patience: float) -> bool:
        self._check()
        return self.built

    @property
    def stats(self) -> EngineStats:
        self._check()
        return self.stats_now

    def add(self, request: Request) -> None:
        self._check()
        if request.adapter is not None and request.adapter not in self.stats_now.adapters:
            raise UnknownAdapterError(f"adapter={request.adapter} is not loaded")
        self.added[request.request_id] = request

    def abort(self, name: str) -> None:
        self._check()
        self.aborted.append(name)

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        return self._call(name, folder)

    def unload_adapter(self, name: str) -> Future[None]:
        return self._call(name, None)

    def _call(self, name: str, folder: str | Path | None) -> Future[None]:
        self.calls.append((name, folder))
        answer: Future[None] = Future()
        if folder == "gone":
            answer.set_exception(CheckpointError("gone"))
        else:
            answer.set_result(None)
        return answer

    def step(self) -> list[StepOutput]:
        if not self.outputs:
            self._check()
        outputs, self.outputs = self.outputs, []
        return outputs

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        self.closed = True


class Fleet(list[FakeProcess]):
    """The processes that a supervisor has started."""

    adapters: tuple[str, ...] = ()

    def start(self, build: Callable[[], Any], *, wait: bool = True) -> FakeProcess:
        self.append(FakeProcess(self, wait=wait))
        return self[-1]

    def kill(self, engine: Supervisor, fault: Exception | None = None) -> list[StepOutput]:
        """What the supervisor returns when the present process dies."""
        self[-1].fault = fault or EngineDiedError("exit code -9")
        return engine.step()

    def revive(self, engine: Supervisor) -> None:
        """Have the new process built."""
        self[-1].built = True
        engine.step()


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    fleet = Fleet()
    monkeypatch.setattr(supervisor, "RemoteEngine", fleet.start)
    monkeypatch.setattr(supervisor, "SETTLED", 0.0)  # no death counts with those before it
    return fleet


def supervised() -> Supervisor:
    return Supervisor(lambda: Echo())


def reasons(outputs: list[StepOutput]) -> dict[str, FinishReason | None]:
    return {output.request_id: output.finish_reason for output in outputs}


def test_what_becomes_of_requests_when_the_process_dies(fleet: Fleet) -> None:
    engine = supervised()
    for name in ("ended", "running", "queued", "dropped"):
        engine.add(Request(name, (1,), timeout=50))
    fleet[0].outputs = [StepOutput("ended", TOKEN, FinishReason.STOP), StepOutput("running", TOKEN)]
    assert len(engine.step()) == 2
    (lost,) = fleet.kill(engine)
    assert (lost.request_id, lost.finish_reason) == ("running", FinishReason.ERROR)
    assert isinstance(lost.error, EngineDiedError)
    assert "exit code -9" in str(lost.error)
    engine.abort("dropped")
    engine.add(Request("new", (1,)))
    with pytest.raises(RequestError, match="request_id=new is in use"):
        engine.add(Request("new", (1,)))
    with pytest.raises(RequestError, match="prompt=''"):
        engine.add(Request("bad", ()))
    assert (engine.step(), fleet[1].added, engine.has_work) == ([], {}, True)
    assert engine.stats == EngineStats(waiting=2, fault="exit code -9")
    fleet.revive(engine)
    assert [*fleet[1].added] == ["queued", "new"]
    assert 0 < (fleet[1].added["queued"].timeout or 0) <= 50
    assert engine.stats == EngineStats(restarts=1)
    assert fleet[0].closed


def test_a_request_that_two_dead_processes_had_is_not_sent_to_a_third(fleet: Fleet) -> None:
    engine = supervised()
    engine.add(Request("killer", (1,)))
    assert fleet.kill(engine) == []
    fleet.revive(engine)
    engine.add(Request("innocent", (1,)))
    assert reasons(fleet.kill(engine)) == {"killer": FinishReason.ERROR}
    fleet.revive(engine)
    assert [*fleet[2].added] == ["innocent"]


def test_a_request_that_reached_no_process_is_trusted(fleet: Fleet) -> None:
    engine = supervised()
    fleet[0].fault = EngineDiedError("exit code -9")
    engine.add(Request("a", (1,)))
    engine.abort("never was")
    for _ in range(2):
        assert engine.step() == []
        fleet.revive(engine)
        assert [*fleet[-1].added] == ["a"]
        fleet[-1].fault = EngineDiedError("exit code -9")
    assert reasons(engine.step()) == {"a": FinishReason.ERROR}, "the second process that had it"


def test_what_arrived_before_the_death_is_delivered(fleet: Fleet) -> None:
    engine = supervised()
    engine.add(Request("a", (1,)))
    fleet[0].outputs = [StepOutput("a", TOKEN, FinishReason.STOP)]
    assert reasons(fleet.kill(engine)) == {"a": FinishReason.STOP}
    assert engine.step() == []
    assert engine.stats.fault == "exit code -9"


def test_a_request_may_time_out_during_a_restart(fleet: Fleet) -> None:
    engine = supervised()
    engine.add(Request("a", (1,), timeout=1e-6))
    fleet.kill(engine)
    assert reasons(engine.step()) == {"a": FinishReason.ABORT}


@pytest.mark.parametrize("while_built", [False, True])
def test_after_three_deaths_in_a_row_it_stops(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, *, while_built: bool
) -> None:
    engine = supervised()
    engine.add(Request("a", (1,)))
    fleet.kill(engine)
    monkeypatch.setattr(supervisor, "SETTLED", 20.0)
    message = "not restarted: it failed 3 times in a row; the last time: no memory"
    with pytest.raises(EngineDiedError, match=message):  # noqa: PT012 - requests that end come first
        for _ in range(MAX_DEATHS):
            if not while_built:
                fleet.revive(engine)
            fleet.kill(engine, ConfigError("no memory"))
    assert engine.has_work, "its thread is to hear of it"
    assert len(fleet) == MAX_DEATHS
    assert all(process.closed for process in fleet)
    engine.close()


def test_deaths_far_apart_do_not_stop_it(fleet: Fleet) -> None:
    engine = supervised()
    for _ in range(10):
        fleet.kill(engine)
        fleet.revive(engine)
    assert engine.stats.restarts == 10


def test_adapters_are_loaded_again(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.adapters = ("given",)
    engine = supervised()
    engine.load_adapter("x", "old").result(0)
    engine.load_adapter("x", "new").result(0)
    engine.load_adapter("lost", "folder").result(0)
    engine.unload_adapter("given").result(0)
    assert isinstance(engine.load_adapter("y", "gone").exception(0), CheckpointError)
    engine._adapters["lost"] = "gone"
    fleet[0].stats_now = EngineStats(adapters=("x", "lost"))
    assert engine.stats.adapters == ("x", "lost")
    fleet.kill(engine)
    engine.add(Request("a", (1,), adapter="lost"))
    with pytest.raises(UnknownAdapterError):
        engine.add(Request("b", (1,), adapter="given"))
    with pytest.raises(EngineDiedError, match="is being restarted"):
        engine.load_adapter("z", "z").result(0)
    fleet[1].stats_now = EngineStats(adapters=("given", "x"))
    fleet[1].built = True
    assert [(output.request_id, type(output.error)) for output in engine.step()] == [("a", UnknownAdapterError)]
    assert fleet[1].calls == [("x", "new"), ("lost", "gone"), ("given", None)]
    assert "adapter 'lost' is lost: gone" in caplog.text


def test_counts_go_on(fleet: Fleet) -> None:
    """Prometheus' counters refuse to fall."""
    engine = supervised()
    counted = EngineStats(running=1, steps=5, generated_tokens=3, speculation=SpeculationCounts(1, 2, 1))
    seen = []
    fleet[0].stats_now = counted
    seen.append(engine.stats)
    fleet.kill(engine)
    seen.append(engine.stats)
    fleet[1].stats_now = counted
    fleet.revive(engine)
    seen.append(engine.stats)
    assert [(stats.steps, stats.running) for stats in seen] == [(5, 1), (5, 0), (10, 1)]
    assert seen[2].speculation == (2, 4, 2)


def silent_at_first(mark: Path) -> Echo:
    """In its first life it answers only prompts that begin with 1."""
    if mark.exists():
        return Echo()
    mark.touch()
    return Half()


class Half(Echo):
    """Answers only prompts that begin with 1, and never to their end."""

    def step(self) -> list[StepOutput]:
        time.sleep(0.01)
        return [StepOutput(name, (1,)) for name, left in self._left.items() if left[0] == 1]


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """With real processes: one request runs, one waits, one comes during the restart."""
    engine = Supervisor(partial(silent_at_first, tmp_path / "mark"))
    engine.add(Request("runs", (1, 2)))
    engine.add(Request("waits", (2, 3)))
    ended: dict[str, StepOutput] = {}
    tokens: dict[str, list[int]] = {"runs": [], "waits": [], "new": []}

    def step() -> None:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ended[output.request_id] = output

    while not tokens["runs"]:
        step()
    process = engine._engine._process
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    while "runs" not in ended:
        step()
    assert "exit code -9" in str(ended["runs"].error)
    assert engine.stats.fault
    engine.add(Request("new", (4, 5)))
    while len(ended) < 3:
        step()
    assert (tokens["waits"], tokens["new"]) == ([2, 3], [4, 5])
    assert (engine.stats.restarts, engine.stats.fault, engine.has_work) == (1, "", False)
    engine.close()
    assert not engine._engine._process.is_alive()
