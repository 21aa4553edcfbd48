"""The address of a server is held from before its model is loaded."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.server.listening import bound, listen


def config(port: int) -> ServerConfig:
    return ServerConfig(server_name="127.0.0.1", server_port=port)


def port_of(sockets: list[socket.socket]) -> int:
    port: int = sockets[0].getsockname()[1]
    return port


def test_two_servers_that_load_cannot_have_one_address() -> None:
    """Nor can one that starts beside connections that are still being closed lose it to another."""
    with bound(config(0)) as sockets:
        port = port_of(sockets)
        with pytest.raises(ConfigError, match=f"server_port={port} cannot be used .*in use"), bound(config(port)):
            pass
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
    with bound(config(port)) as sockets:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sockets[0].listen()
        with socket.create_connection(("127.0.0.1", port)):
            sockets[0].accept()[0].close()  # this side closes first, so its connection stays for a minute
    with bound(config(port)):
        pass


@pytest.mark.parametrize("name", ["no such host.invalid", "203.0.113.1"])
def test_an_address_of_another_machine(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"), bound(ServerConfig(server_name=name, server_port=0)):
        pass


async def application(scope: object, receive: object, send: object) -> None:
    """Has no lifespan, and answers nothing."""
    raise AssertionError


def test_it_says_that_it_listens_when_it_does_and_ends_when_asked() -> None:
    said: list[bool] = []
    with bound(config(0)) as sockets:
        port = port_of(sockets)

        def began() -> None:
            with socket.create_connection(("127.0.0.1", port)):
                said.append(True)

        listen(application, config(port), sockets, began=began, ended=lambda: bool(said))
    assert said == [True]


def test_what_is_wrong_is_said_before_jax_is_imported() -> None:
    """A port in use, and a model that is not there."""
    code = """
import sys
from jaxdeploy.cli import main
taken = main(["serve", "api_server", "--server-name", "127.0.0.1", "--server-port", sys.argv[1]])
wrong = main(["chat", "/nowhere", "--prompt", "hi"])
assert (taken, wrong, "jax" in sys.modules) == (2, 2, False)
"""
    with bound(config(0)) as sockets:
        command = [sys.executable, "-c", code, str(port_of(sockets))]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    taken, wrong = ran.stderr.splitlines()
    assert "cannot be used" in taken
    assert "/nowhere does not exist" in wrong
