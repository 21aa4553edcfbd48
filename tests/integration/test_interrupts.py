"""Ctrl-C ends a program quietly, with exit code 130 and without processes that it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from tests.integration.test_engine_death import engine_of
from tests.integration.test_server_process import answers, free_port
from tests.served import until

SMALL = ("--session-len", "256", "--max-batch-size", "2")


@contextmanager
def in_a_terminal(log: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program in a separate process group, as a shell does, with an empty compilation cache."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(log.parent / "cache")}
    reset = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = reset + "from jaxdeploy.cli import program; program(sys.argv[1:])"
    command = [sys.executable, "-c", code, *argv]
    with (
        log.open("wb") as lines,
        subprocess.Popen(command, stdout=lines, stderr=lines, env=env, start_new_session=True) as running,
    ):
        try:
            yield running
        finally:
            running.kill()


def press(running: subprocess.Popen[bytes], times: int) -> None:
    for _ in range(times):
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.5)


def nothing_left(group: int) -> bool:
    """Whether every process of a group has ended."""
    stats = [text for path in Path("/proc").glob("[0-9]*/stat") if (text := read(path))]
    fields = [text.rpartition(")")[2].split() for text in stats]
    return not any(int(pgrp) == group and state != "Z" for state, _, pgrp, *_ in fields)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("program", ["chat", "api_server"])
def test_while_programs_compile(tmp_path: Path, program: str, times: int) -> None:
    log = tmp_path / "log"
    where = ("--server-name", "127.0.0.1", "--server-port", str(free_port()))
    argv = ("chat", "--prompt", "hi", "--log-level", "INFO") if program == "chat" else ("serve", program, *where)
    with in_a_terminal(log, *argv, *SMALL) as running:
        assert until(lambda: "step shapes" in log.read_text(), 240)
        time.sleep(2)
        press(running, times)
        assert running.wait(60) == 130
        assert until(lambda: nothing_left(running.pid), 10)
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_twice_while_replies_run(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    url = f"http://127.0.0.1:{port}"
    argv = ("serve", "api_server", "--server-name", "127.0.0.1", "--server-port", str(port), "--no-warmup")
    with in_a_terminal(log, *argv, "--session-len", "2048", "--max-batch-size", "2") as running:
        assert until(lambda: answers(url) or running.poll() is not None, 240)
        assert engine_of(running) is not None
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1900, "ignore_eos": True}
        seen: list[str] = []

        def follow() -> None:
            with (
                suppress(httpx2.TransportError),
                httpx2.stream(
                    "POST", f"{url}/v1/chat/completions", json={**asked, "stream": True}, timeout=60
                ) as reply,
            ):
                seen.extend(reply.iter_lines())

        def ask() -> None:
            with suppress(httpx2.TransportError):
                httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=60)

        clients = [threading.Thread(target=target) for target in (follow, follow, ask)]
        for client in clients:
            client.start()
        time.sleep(5)
        press(running, 2)
        assert running.wait(30) == 130
        for client in clients:
            client.join(60)
        assert until(lambda: nothing_left(running.pid), 10)
    text = log.read_text()
    assert "Traceback" not in text
    assert "ERROR" not in text
