"""Converts errors of the native tokenizer libraries into errors of jaxdeploy."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from jaxdeploy.errors import JaxdeployError

_PANIC = "PanicException"
"""Name of the class for a panic in Rust. The class is no ``Exception`` and cannot be imported."""


@contextmanager
def refusing(kind: type[JaxdeployError], fault: str, advice: str) -> Iterator[None]:
    """Raise ``kind`` with one line for any error in the body, a panic of a Rust library included.

    Errors of this project pass unchanged, and so do interrupts.
    """
    try:
        yield
    except JaxdeployError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(f"{fault} ({reason:.300}); {advice}") from error


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Hold back what is written to file descriptor 2 in the body, and drop it if the body raises.

    A panic in Rust prints its message and a backtrace there before it becomes a Python exception.
    """
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
        held.seek(0)
        os.write(2, held.read())
