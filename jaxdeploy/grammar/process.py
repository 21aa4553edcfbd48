"""Starts the processes that compile untrusted grammars (``jaxdeploy.grammar.worker``) and talks to them."""

from __future__ import annotations

import json
import os
import struct
import sys
from subprocess import DEVNULL, PIPE, Popen

SECONDS = 2.0
"""CPU time that a grammar may take."""

MEMORY = 2**31
"""Bytes of address space."""

STACK = 2**20
"""Bytes of stack. The engine compiles with more, so a grammar that compiles in a worker cannot overflow its stack."""

TOO_MUCH = (
    f"response_format does not compile within {SECONDS:g} s, {MEMORY >> 30} GiB of memory and {STACK >> 20} MiB of "
    "stack; simplify it, nest less"
)

HEADER = struct.Struct(">I")
"""Precedes a message: its length in bytes."""

Answer = dict[str, str | None]
"""``grammar`` or ``fault``."""


def start(seconds: float = SECONDS) -> Popen[bytes]:
    """Start a worker that takes jobs of ``seconds`` of CPU time at most. It ends when its stdin is closed."""
    command = [sys.executable, "-m", "jaxdeploy.grammar.worker", str(seconds)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=env)


def ask(worker: Popen[bytes], job: bytes) -> Answer:
    """Have ``job``, a ``response_format`` as JSON, compiled.

    Raises:
        OSError, EOFError: the worker has ended: the job needs more than it may take.
    """
    assert worker.stdin is not None, "it was started with pipes"
    assert worker.stdout is not None, "it was started with pipes"
    worker.stdin.write(HEADER.pack(len(job)) + job)
    worker.stdin.flush()
    header = worker.stdout.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError("the worker has ended")
    answer: Answer = json.loads(worker.stdout.read(*HEADER.unpack(header)))
    return answer
