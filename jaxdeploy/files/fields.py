"""Typed access to the fields of a JSON file; the errors name file and field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import shown

MAX_WHOLE = 2**31 - 1
T = TypeVar("T")


@dataclass(frozen=True)
class StoredFields:
    """The fields of a JSON object that was read from ``file``.

    A field that is null counts as absent, and its default is returned. 20.0 is the whole number 20. Every method raises
    ``CheckpointError`` for a value of another type or outside its range.
    """

    values: Mapping[str, Any]
    file: str = "config.json"

    def whole(self, name: str, default: T, *, least: int = 1, most: int = MAX_WHOLE) -> int | T:
        """Return a whole number from ``least`` to ``most``."""
        value = self.values.get(name)
        if value is None:
            return default
        if not is_whole(value):
            raise self.fault(name, "must be a whole number")
        if not least <= value <= most:
            raise self.fault(name, f"must lie between {least} and {most}")
        return int(value)

    def number(self, name: str, default: T, *, least: float, most: float) -> float | T:
        """Return a finite number from ``least`` to ``most``."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(name, "must be a number")
        if not least <= value <= most:  # NaN compares false
            raise self.fault(name, f"must lie between {least:g} and {most:g}")
        return float(value)

    def flag(self, name: str, default: T) -> bool | T:
        """Return true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fault(name, "must be true or false")
        return value

    def text(self, name: str, default: T, choices: Sequence[str] = ()) -> str | T:
        """Return a text, one of ``choices`` if these are given."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fault(name, "must be a text")
        if choices and value not in choices:
            raise self.fault(name, f"must be one of {', '.join(choices)}")
        return value

    def nested(self, name: str) -> StoredFields:
        """Return the fields of an object inside this one; no fields if it is absent."""
        value = self.values.get(name)
        if not isinstance(value, Mapping | None):
            raise self.fault(name, "must be an object")
        return StoredFields(value or {}, f"{self.file}: {name}")

    def items(self, name: str) -> list[Any]:
        """Return a list; empty if the field is absent."""
        value = self.values.get(name)
        if not isinstance(value, list | tuple | None):
            raise self.fault(name, "must be a list")
        return list(value or ())

    def texts(self, name: str) -> list[str]:
        """Return a list of texts; empty if the field is absent."""
        found = self.items(name)
        if not all(isinstance(text, str) for text in found):
            raise self.fault(name, "must be a list of texts")
        return found

    def fault(self, name: str, rule: str) -> CheckpointError:
        """Return the error for a field that breaks ``rule``."""
        return CheckpointError(f"{self.file}: {name}={shown(self.values.get(name))} {rule}; correct it or remove it")


def is_whole(value: Any) -> bool:
    """Return whether ``value`` is a number without a fraction; true and false are no numbers."""
    if isinstance(value, float):
        return math.isfinite(value) and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)
