"""Locks that keep two processes from writing to one folder at the same time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_held: dict[Path, int] = {}
"""Folder → the open descriptor that holds its lock. The system releases a lock when its process ends."""


def lock(folder: Path) -> bool:
    """Lock ``folder`` for this process; return False if another process holds the lock.

    Locking again in the same process changes nothing. A file system without locks counts as unlocked.

    Raises ``OSError``: the folder is missing or cannot be opened.
    """
    unlock(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:
        os.close(handle)
        return True
    _held[folder] = handle
    if os.path.samestat(os.fstat(handle), folder.stat()):
        return True
    unlock(folder)  # another process has renamed the folder meanwhile
    return False


def unlock(folder: Path) -> None:
    """Release the lock that this process holds on ``folder``, if it holds one."""
    handle = _held.pop(folder, None)
    if handle is not None:
        os.close(handle)
