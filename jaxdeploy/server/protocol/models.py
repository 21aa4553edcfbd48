"""What a server says of the models that requests may name; OpenAI's form with vLLM's fields, and Anthropic's."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel


class ModelCard(BaseModel):
    """A model by its name; ``max_model_len`` is what a prompt and its reply may have together.

    A LoRA adapter has a ``parent``, the model that it belongs to, and its folder as its ``root``.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxdeploy"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    """All models; the first is the one that answers where none is named."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AnthropicModel(BaseModel):
    """A model, or an adapter of it."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: datetime


class AnthropicModelList(BaseModel):
    """All of them, on one page."""

    data: list[AnthropicModel]
    has_more: bool = False
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, created: Iterable[tuple[str, int]]) -> Self:
        """Names, and since when they are served, in seconds since 1970."""
        models = [
            AnthropicModel(id=name, display_name=name, created_at=datetime.fromtimestamp(seconds, UTC))
            for name, seconds in created
        ]
        return cls(data=models, first_id=models[0].id if models else None, last_id=models[-1].id if models else None)
