"""The server as its users start it: a process, told to end by a signal."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

import jaxdeploy
from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError
from tests.served import until

ASK = {"messages": [{"role": "user", "content": "What is 6 times 7?"}], "max_tokens": 60, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server over the bundled model, and its address."""
    port = free_port()
    flags = ["--server-name", "127.0.0.1", "--server-port", str(port), "--no-warmup", "--max-batch-size", "2"]
    command = [sys.executable, "-m", "jaxdeploy", "serve", "api_server", *flags, "--log-format", "json"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as running:
        yield running, f"http://127.0.0.1:{port}"
        running.kill()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_replies_that_run_are_finished_at_the_end(process: tuple[subprocess.Popen[bytes], str], tmp_path: Path) -> None:
    running, url = process
    assert until(lambda: answers(url) or running.poll() is not None, 120)
    assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "jaxdeploy-demo"
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json={**ASK, "stream": True}, timeout=60) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        running.send_signal(signal.SIGTERM)
        *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert running.wait(30) == -signal.SIGTERM, "it ends as it was told to, when all is done"
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    (line,) = [line for line in logged if line["message"] == "POST /v1/chat/completions"]
    assert line["status"] == 200
    assert line["request_id"]


def test_what_cannot_be_served_is_one_line() -> None:
    with pytest.raises(ConfigError, match="ssl_certfile=None is no file"):
        jaxdeploy.serve("m", server_config=ServerConfig(ssl=True))
    command = [sys.executable, "-m", "jaxdeploy", "serve", "api_sever"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: program='api_sever' is unknown; choose one of api_server\n"
