"""The server as its users start it: a process, told to end by a signal."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

import jaxdeploy
from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.registry import read_config
from tests.served import until
from tests.tiny_adapters import TinyAdapter

ASK = {"messages": [{"role": "user", "content": "What is 6 times 7?"}], "max_tokens": 60, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def launched(log: Path, program: str, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A program of ``jaxdeploy serve``, and the address at which it is going to listen."""
    port = free_port()
    where = ["--server-name", "127.0.0.1", "--server-port", str(port), "--log-format", "json"]
    command = [sys.executable, "-m", "jaxdeploy", "serve", program, *where, *flags]
    with log.open("wb") as lines, subprocess.Popen(command, stderr=lines) as running:
        try:
            yield running, f"http://127.0.0.1:{port}"
        finally:
            running.kill()


@contextmanager
def started(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server over the bundled model, and its address."""
    with launched(log, "api_server", *flags) as (running, url):
        assert until(lambda: answers(url) or running.poll() is not None, 240), "it did not start"
        yield running, url


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_replies_that_run_are_finished_at_the_end(tmp_path: Path) -> None:
    with started(tmp_path / "log", "--no-warmup", "--max-batch-size", "2") as (running, url):
        ends_in_peace(running, url, tmp_path / "log")


@pytest.mark.slow
def test_adapters_come_and_go(tmp_path: Path) -> None:
    """Across the border of the engine's process."""
    base = read_config(read_hf_config(Path(bundled_model())))
    folders = {
        name: str(TinyAdapter(seed=seed, base=base).write(tmp_path / name, config={"lora_alpha": 24}))
        for seed, name in enumerate(("poet", "pirate"))
    }
    flags = ["--no-warmup", "--max-batch-size", "2", "--session-len", "256", "--api-keys", "KEY"]
    flags += ["--adapters", folders["poet"], "--max-loras", "1", "--max-lora-rank", "8"]
    with (
        started(tmp_path / "log", *flags) as (_, url),
        httpx2.Client(base_url=url, headers={"x-api-key": "KEY"}, timeout=60) as http,
    ):

        def say(name: str) -> str:
            asked = {**ASK, "model": name, "temperature": 0}
            text: str = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
            return text

        def load(name: str, folder: str) -> httpx2.Response:
            return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": folder})

        replies = [say(""), say("poet")]
        with http.stream("POST", "/v1/chat/completions", json={**ASK, "model": "poet", "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert load("pirate", folders["pirate"]).status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"
        replies.append(say("pirate"))
        assert len({*replies}) == 3
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["jaxdeploy-demo", "poet", "pirate"]
        other = TinyAdapter().write(tmp_path / "other")
        assert "lora_A has shape [4, 32], [4, 256] expected" in load("other", str(other)).text
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"}).status_code == 200
        assert http.post("/v1/chat/completions", json={**ASK, "model": "pirate"}).status_code == 404
        assert say("poet") == replies[1]


def ends_in_peace(running: subprocess.Popen[bytes], url: str, log: Path) -> None:
    assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "jaxdeploy-demo"
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json={**ASK, "stream": True}, timeout=60) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        running.send_signal(signal.SIGTERM)
        *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert running.wait(30) == -signal.SIGTERM, "it ends as it was told to, when all is done"
    logged = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    (line,) = [line for line in logged if line["message"] == "POST /v1/chat/completions"]
    assert line["status"] == 200
    assert line["request_id"]


def test_without_its_packages_the_server_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['fastapi'] = None; from jaxdeploy.cli import main"
    code = f"{hidden}; sys.exit(main(['serve', 'api_server']))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: the server needs fastapi, which is missing; pip install 'jaxdeploy[serve]'\n"


def test_what_cannot_be_served_is_one_line() -> None:
    with pytest.raises(ConfigError, match="ssl_certfile=None is no file"):
        jaxdeploy.serve("m", server_config=ServerConfig(ssl=True))
    command = [sys.executable, "-m", "jaxdeploy", "serve", "api_sever"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: program='api_sever' is unknown; choose one of api_server, proxy, api_client, gradio\n"


def certificate(folder: Path) -> tuple[Path, Path]:
    """One for 127.0.0.1, and its key."""
    chain, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(chain), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return chain, key


@pytest.mark.slow
def test_with_tls_and_keys_nothing_answers_without_a_key(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    port = free_port()
    flags = ["--server-name", "127.0.0.1", "--server-port", str(port), "--no-warmup", "--max-batch-size", "2"]
    flags += ["--ssl", "--ssl-certfile", str(chain), "--ssl-keyfile", str(key), "--api-keys", "right", "other"]
    command = [sys.executable, "-m", "jaxdeploy", "serve", "api_server", *flags]
    trusted = ssl.create_default_context(cafile=chain)
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as server,
        httpx2.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60) as client,
    ):
        assert until(lambda: is_healthy(client) or server.poll() is not None, 240), "it did not start"
        right = {"Authorization": "Bearer right"}
        paths: dict[str, Any] = client.get("/openapi.json", headers=right).json()["paths"]
        assert len(paths) > 15
        for path, methods in paths.items():
            for method in methods:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "righ"}):
                    status = client.request(method.upper(), path, headers=headers).status_code
                    assert status == (200 if path == "/health" else 401), (method, path, headers)
        asked = {**ASK, "max_tokens": 3}
        assert client.post("/v1/chat/completions", headers=right, json=asked).status_code == 200
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{port}/health")
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx2.get(f"https://127.0.0.1:{port}/health")
        server.kill()


def is_healthy(client: httpx2.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx2.TransportError:
        return False
