"""The marker file of a folder: the list of files that jaxdeploy wrote there.

A command replaces or deletes a file only if the marker of its folder lists it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jaxdeploy.checkpoint.writing import put_json, unfinished_files

NAME = "jaxdeploy_files.json"
_TOOL = "jaxdeploy"


@dataclass(frozen=True)
class Marker:
    """What one marker file says.

    ``command`` is the command that wrote last.
    ``files`` are the names of the files in the folder that jaxdeploy wrote, without the marker itself.
    ``run`` identifies an unfinished run that can be resumed; it is empty once the run has finished.
    """

    command: str
    files: frozenset[str]
    run: str = ""

    def write(self, folder: Path) -> None:
        """Write the marker file of ``folder``. Raises ``OSError``."""
        value = {
            "tool": _TOOL,
            "version": metadata.version(_TOOL),
            "command": self.command,
            "files": sorted(self.files),
        }
        put_json(folder / NAME, {**value, "run": self.run} if self.run else value)


def read_marker(folder: Path) -> Marker:
    """Return the marker of ``folder``, or one without files if there is no valid marker file.

    Names that would lead out of the folder are left out.
    """
    try:
        value = json.loads((folder / NAME).read_bytes())
        files, ours = value["files"], value["tool"] == _TOOL
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Marker("", frozenset())
    if not ours or not isinstance(files, list):
        return Marker("", frozenset())
    names = frozenset(name for name in files if _is_plain_name(name))
    return Marker(str(value.get("command", "")), names, str(value.get("run", "")))


def foreign_files(folder: Path) -> list[str]:
    """Return the sorted names of the entries of ``folder`` that its marker does not list. Raises ``OSError``.

    A missing folder has none. Folders are never listed in a marker.
    """
    if not folder.exists():
        return []
    ours = read_marker(folder).files
    known = {folder / name for name in ours} | set(unfinished_files(folder, ours | {NAME}))
    if ours:
        known.add(folder / NAME)
    return sorted(entry.name for entry in folder.iterdir() if entry not in known or _is_folder(entry))


def foreign_among(folder: Path, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that exist in ``folder`` and that its marker does not list."""
    ours = read_marker(folder).files
    return sorted(name for name in names if name not in ours and _exists(folder / name))


def add_to_marker(folder: Path, command: str, names: Iterable[str]) -> None:
    """Add ``names`` to the files that the marker of ``folder`` lists; call it before they are written.

    Raises ``OSError``.
    """
    Marker(command, read_marker(folder).files | frozenset(names)).write(folder)


def remove_files(folder: Path) -> None:
    """Delete the files that the marker of ``folder`` lists, then the marker. Raises ``OSError``."""
    ours = read_marker(folder).files
    if not ours:
        return
    for file in (*unfinished_files(folder, ours), *(folder / name for name in ours), folder / NAME):
        file.unlink(missing_ok=True)


def remove_ours(folder: Path) -> None:
    """Delete the files that the marker of ``folder`` lists, then the marker, then the folder if it is empty.

    Raises ``OSError``.
    """
    remove_files(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
