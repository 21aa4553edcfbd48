"""An event of a stream whose events have names."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class StreamEvent(BaseModel):
    """An event of a stream: its ``type``, and fields that depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str

    @classmethod
    def of(cls, type_: str, **fields: Any) -> StreamEvent:
        """One with these fields."""
        return cls.model_validate({"type": type_, **fields})
