"""Requests whose validation is bounded: it ends with the first wrong item of a list, however many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MOST_KEYS = 1024
"""Largest number of members of an object whose values have a schema."""


_LEAVES = frozenset({"metadata", "serialization", "cls", "config", "default"})
"""Parts of a schema that hold no other schemas."""
_ANY = {"type": "any"}


def _bounded(schema: Any) -> Any:
    """Return ``schema`` with bounds on every list and dictionary within it."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_bounded, schema))
    if not isinstance(schema, dict):
        return schema
    leaves = _LEAVES if isinstance(schema.get("type"), str) else ()  # else the keys are names of fields
    inner = {name: value if name in leaves else _bounded(value) for name, value in schema.items()}
    if inner.get("type") == "list":
        return {**inner, "fail_fast": True}
    if inner.get("type") == "dict" and inner.get("values_schema", _ANY)["type"] != "any":
        return core_schema.no_info_before_validator_function(_few, inner)
    return inner


def _few(given: Any) -> Any:
    if isinstance(given, Mapping) and len(given) > MOST_KEYS:
        raise PydanticCustomError(
            "too_many_members", "it has {count} members, at most {most}", {"count": len(given), "most": MOST_KEYS}
        )
    return given


class Bounded(BaseModel):
    """A part of a request. Of a list only the first wrong item is reported; no object has too many members."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _bounded(handler(source))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _few_members(cls, given: Any) -> Any:
        return _few(given) if isinstance(given, Mapping) and len(given) > MOST_KEYS else given
