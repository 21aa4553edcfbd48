"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def put_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file beside ``file``, then rename it; readers see the old file or the whole new one.

    Raises ``OSError``. The old file stays as it is if writing fails.
    """
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
    """Write ``text`` as UTF-8 with ``put_file``. Raises ``OSError``."""
    put_file(file, lambda handle: handle.write(text.encode()))


def check_replaceable(file: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Check that ``file`` may be written: it is missing or empty, or ``is_ours`` accepts its content.

    Raises ``OSError``: the content is of another kind, or cannot be read.
    """
    if not file.exists():
        return
    content = file.read_bytes()
    if content and not is_ours(content):
        raise FileExistsError(errno.EEXIST, "it exists and holds something else", str(file))
