"""The ``jaxdeploy`` command. A module is imported when its command runs, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn, Protocol, cast

from jaxdeploy.cli.flags import Namespace, Parser
from jaxdeploy.errors import ConfigError, JaxdeployError
from jaxdeploy.settings import nearest

INTERRUPTED = 130


class Command(NamedTuple):
    """Where a command lives, and what it does in a few words."""

    module: str
    help: str


COMMANDS = {
    "chat": Command("jaxdeploy.cli.chat", "talk with a model in the terminal"),
    "serve": Command("jaxdeploy.cli.serve", "put a model behind an OpenAI-compatible HTTP API"),
    "lite": Command(
        "jaxdeploy.cli.lite", "make a model small: AWQ, GPTQ, SmoothQuant, KV cache ranges; merge LoRA adapters"
    ),
    "list": Command("jaxdeploy.cli.list", "show model families, architectures and chat templates"),
    "check_env": Command("jaxdeploy.cli.check_env", "show versions, devices, memory and usable kernels"),
}


class CommandModule(Protocol):
    """What the module of a command defines."""

    def add_arguments(self, parser: Parser) -> None:
        """Declare the flags."""
        ...

    def run(self, args: Namespace) -> int:
        """Do the work; the exit code comes back."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can mend are one line on stderr and exit code 2."""
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except JaxdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        print(f"error: {error.strerror}; make room, or write to another place", file=sys.stderr)
        return ConfigError.exit_code


def _discard_output() -> None:
    """Lead stdout nowhere; Python would complain again when it flushes it at its own end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``main`` as this process, and end it.

    After Ctrl-C the interpreter is not shut down: that can crash while XLA compiles or computes in other threads. The
    command has closed its model by then.
    """
    _open_missing_streams()
    try:
        code = main(argv)
    except KeyboardInterrupt:  # once more, while the first one was handled
        code = INTERRUPTED
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _open_missing_streams() -> None:
    """Replace standard streams that were closed before the start, which are ``None``."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def command_parser(name: str) -> Parser:
    """The parser of one command."""
    parser = Parser(prog=f"jaxdeploy {name}", description=COMMANDS[name].help)
    _module(name).add_arguments(parser)
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(_version())
        return 0
    name = argv[0].replace("-", "_")
    if name not in COMMANDS:
        advice = "; ".join(filter(None, [nearest(name, COMMANDS), "`jaxdeploy --help` lists them"]))
        raise ConfigError(f"command={argv[0]!r} is unknown; {advice}")
    return _module(name).run(command_parser(name).read(argv[1:]))


def _module(name: str) -> CommandModule:
    return cast(CommandModule, importlib.import_module(COMMANDS[name].module))


def _overview() -> str:
    lines = [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    usage = "usage: jaxdeploy COMMAND [flags]     jaxdeploy COMMAND --help shows a command's flags"
    return "\n".join([usage, "", *lines, "", "  --version    show the version"])


def _version() -> str:
    from jaxdeploy import __version__

    return f"jaxdeploy {__version__}"
