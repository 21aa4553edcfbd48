"""Reads files of a model folder: regular files only, with limits on bytes and JSON values."""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError

DAMAGED = "download it again"
MAX_BYTES = 64 * 2**20
"""The largest known tokenizer.json has 35 MB."""
MAX_VALUES = 5_000_000
"""JSON values of a file. An empty list or object takes 64 bytes in memory and two in the file."""

_STRUCTURE = (b",", b":", b"[", b"{")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Return a short ``repr`` of ``value`` in one line, whatever its size and depth."""
    return " ".join(_SHORT.repr(value).splitlines())


def check_regular(path: Path) -> int:
    """Return the size of the file in bytes.

    Raises ``OSError``: the file is missing or inaccessible. ``CheckpointError``: it is a directory, a FIFO, a socket or
    a device, and opening it might block.
    """
    try:
        found = path.stat()
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise CheckpointError(f"{shown(path.name)} is not a file name; {DAMAGED}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file; replace it by one")
    return found.st_size


def exists(path: Path) -> bool:
    """Return whether ``path`` exists, as a regular file or not; a broken link counts."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the name
        return False


def is_folder(path: Path) -> bool:
    """Return whether ``path`` is a directory; false also for names that the file system does not take."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a regular file; false also for names that the file system does not take."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def user_path(text: str | Path) -> Path:
    """Return the path that ``text`` names, with ``~`` expanded if that user has a home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises ``FileNotFoundError``: there is none. ``CheckpointError``: it cannot be read, or has more than ``most``
    bytes.
    """
    try:
        size = check_regular(path)
        if size > most:
            raise CheckpointError(f"{path} has {size} bytes, {most} at most are read; {DAMAGED}")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Return the content of a regular UTF-8 file.

    Raises as ``read_bytes``, and ``CheckpointError`` for other encodings.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error.reason}); {DAMAGED}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises ``FileNotFoundError``: there is no file. ``CheckpointError``: it cannot be read, or holds something else.
    """
    return parse_json(read_bytes(path), f"{path}:")


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in ``content``; error messages call it ``name``.

    Raises ``CheckpointError``: it is not JSON, not an object, too large, or holds half of a surrogate pair.
    """
    if sum(map(content.count, _STRUCTURE)) > MAX_VALUES:
        raise CheckpointError(f"{name} has more than {MAX_VALUES} JSON values; {DAMAGED}")
    try:
        found = json.loads(content)
        if _SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested too deeply for JSON; {DAMAGED}") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{name} holds half of a surrogate pair, which is no text; {DAMAGED}") from error
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON ({error}); {DAMAGED}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is not a JSON object; {DAMAGED}")
    return found
