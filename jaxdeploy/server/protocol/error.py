"""What an error says."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What went wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's form of an error, and with its ``type`` Anthropic's too."""

    type: Literal["error"] = "error"
    error: ErrorBody
