"""The process of an engine: how it starts, which signals it ignores, and how it ends with its owner."""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from logging.handlers import QueueHandler
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any

from jaxdeploy.errors import ConfigError, JaxdeployError

NAME = "jaxdeploy-engine"
UNGUARDED = 64
"""Exit code of an engine's process whose main script starts another engine while it is imported."""
OF_THE_OWNER = (signal.SIGINT, signal.SIGTERM)
"""Signals that a terminal or a service manager sends to both processes. Only the owner acts on them."""
PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when the thread that started it ends."""


class EngineDiedError(JaxdeployError):
    """The engine's process has ended; the message has the reason."""

    exit_code = 1
    http_status = 503


class UnguardedScriptError(ConfigError):
    """A script starts an engine's process at its top level, so the new process would start one too."""

    def __init__(self) -> None:
        super().__init__(
            "the script needs a main guard: the engine's process imports it again; "
            "put the call under `if __name__ == '__main__':`"
        )


def exit_if_imported_again() -> None:
    """End an engine's process that starts an engine of its own because it imports a script without a main guard."""
    if multiprocessing.current_process().name == NAME:
        raise SystemExit(UNGUARDED)


def start(target: Callable[..., None], *args: Any) -> SpawnProcess:
    """Start a process that calls ``target`` and dies with its owner, even if the owner is killed.

    The process ignores the signals ``OF_THE_OWNER``, also while it imports its modules.
    """
    exit_if_imported_again()
    owner = os.getpid()
    # PDEATHSIG reports the end of the starting *thread*. Only the main thread lives as long as the owner.
    by_main_thread = threading.current_thread() is threading.main_thread()
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(owner, by_main_thread, target, *args), name=NAME, daemon=True
    )
    resource_tracker.ensure_running()  # its start would unblock the signals below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_OWNER)  # the new process inherits the mask
    try:
        process.start()
        atexit.register(process.kill)  # multiprocessing would send SIGTERM, which is ignored, and wait
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def kill(process: SpawnProcess) -> None:
    """End the process now, and wait until it has ended."""
    process.kill()
    process.join()
    atexit.unregister(process.kill)


def _run(owner: int, by_main_thread: bool, target: Callable[..., None], *args: Any) -> None:
    for number in OF_THE_OWNER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_OWNER)
    if by_main_thread and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != owner:  # it died before the call
            os._exit(1)
    threading.Thread(target=_end_with_owner, name="jaxdeploy-watch", daemon=True).start()
    target(*args)


def _end_with_owner() -> None:
    """For other threads and systems: the pipe of ``multiprocessing`` closes when the owner ends."""
    owner = multiprocessing.parent_process()
    assert owner is not None, "an engine's process has an owner"
    owner.join()
    os._exit(1)


class LogSender(QueueHandler):
    """Sends log records to the owner, whose handlers write them in their own format."""

    def __init__(self, send: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._send(record)


def log_through(send: Callable[[logging.LogRecord], None], level: int) -> None:
    """Have the logger ``jaxdeploy`` of this process send its records of at least ``level``."""
    logger = logging.getLogger("jaxdeploy")
    logger.handlers, logger.propagate = [LogSender(send)], False
    logger.setLevel(level)
