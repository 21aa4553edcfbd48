"""Gives a folder the name of another."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CURRENT_FOLDER = -100  # AT_FDCWD of Linux
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux


def swap(new: Path, target: Path) -> Path | None:
    """Rename the folder ``new`` to ``target`` and return where the folder that had this name is now.

    Returns ``None`` if there was none or it was empty. Raises ``OSError``.
    """
    if not target.exists() or not any(target.iterdir()):
        new.rename(target)
        return None
    if _exchange(new, target):
        return new
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    new.rename(target)
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or its file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0
