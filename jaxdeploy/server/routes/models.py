"""``/v1/models``: what is served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from jaxdeploy.server.dependencies import Model

router = APIRouter(tags=["models"])


class ModelCard(BaseModel):
    """A model by its name; ``max_model_len`` is what a prompt and its reply may have together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxdeploy"
    max_model_len: int


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def models(served: Model) -> ModelList:
    """The models that a request may name."""
    return ModelList(data=[_card(served)])


@router.get("/v1/models/{name:path}")
async def model(name: str, served: Model) -> ModelCard:
    """One of them."""
    served.check_model(name)
    return _card(served)


def _card(served: Model) -> ModelCard:
    return ModelCard(id=served.name, created=served.created, max_model_len=served.session_len)
