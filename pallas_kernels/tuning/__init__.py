"""Tile sizes: those the caller gives, else those measured on this device, else what the op's heuristic says.

Measured ones are in ``tuning/<device>/<op>.json``, written by ``scripts/tune_kernels.py``: call key → fields of the
op's ``Tiles``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent

Tiles = TypeVar("Tiles", bound=Any)


def choose(op: str, kind: str, key: str, explicit: Tiles | None, heuristic: Tiles) -> Tiles:
    """The tiles for a call of ``op`` described by ``key`` on a device of ``kind`` (JAX's ``device_kind``)."""
    if explicit is not None:
        return explicit
    measured = table(op, kind).get(key)
    return heuristic if measured is None else replace(heuristic, **measured)


@cache
def table(op: str, kind: str) -> dict[str, dict[str, Any]]:
    """What was measured for ``op`` on ``kind``: key → fields; empty where nothing was."""
    path = table_path(op, kind)
    if not path.exists():
        return {}
    tiles: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))["tiles"]
    return tiles


def table_path(op: str, kind: str) -> Path:
    """Where the measured tiles of ``op`` on ``kind`` are kept."""
    return FOLDER / kind.replace(" ", "_") / f"{op}.json"
