"""Text that UTF-8 can hold. A Python string may also hold lone surrogates, e.g. half of an emoji."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def well_formed(text: str) -> str:
    """Return ``text`` with pairs of surrogates joined and every lone surrogate replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def well_formed_values(value: Any) -> Any:
    """Return a JSON value with ``well_formed`` applied to all of its strings, keys included."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {well_formed_values(key): well_formed_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [well_formed_values(item) for item in value]
    return value
