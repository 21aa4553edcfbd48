"""Writes a file so that it appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def put_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file in the folder of ``file``, then rename it; readers see the old file or the whole new one.

    A device or pipe, such as ``/dev/null``, is written directly.

    Raises ``OSError``. The old file stays unchanged if writing fails.
    """
    if file.exists() and not file.is_file():
        with file.open("wb") as handle:
            write(handle)
        return
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def put_text(file: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``put_file``; a lone surrogate becomes ``?``. Raises ``OSError``."""
    put_file(file, lambda handle: handle.write(text.encode(errors="replace")))


def check_replaceable(file: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Check that ``file`` may be written: it is missing, empty or no regular file, or ``is_ours`` accepts its content.

    Raises ``OSError``: the content is of another kind, or cannot be read.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    if content and not is_ours(content):
        raise FileExistsError(errno.EEXIST, "it exists and holds something else", str(file))


def is_json(kind: type) -> Callable[[bytes], bool]:
    """Return a function for ``check_replaceable`` that accepts JSON whose value is of this Python type."""

    def accepts(content: bytes) -> bool:
        try:
            return isinstance(json.loads(content), kind)
        except (ValueError, RecursionError):
            return False

    return accepts
