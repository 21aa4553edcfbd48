"""``/v1/models`` and ``/anthropic/v1/models``: what is served."""

from __future__ import annotations

from fastapi import APIRouter

from jaxdeploy.server.dependencies import Model
from jaxdeploy.server.errors import UnknownModelError
from jaxdeploy.server.protocol.models import AnthropicModelList, ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(service: Model) -> ModelList:
    """What a request may name as its model: the model, and its LoRA adapters."""
    return ModelList(data=_cards(service))


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Model) -> ModelCard:
    """One model of the list; 404 if it is not there."""
    card = next((card for card in _cards(service) if card.id == name), None)
    if card is None:
        raise UnknownModelError(f"model={name!r:.80} is not served here; GET /v1/models lists what is")
    return card


@router.get("/anthropic/v1/models", tags=["Anthropic"])
async def anthropic_models(service: Model) -> AnthropicModelList:
    """The same as Anthropic lists them."""
    return AnthropicModelList.of((card.id, card.created) for card in _cards(service))


def _cards(service: Model) -> list[ModelCard]:
    length, name = service.session_len, service.name
    adapters = [
        ModelCard(id=adapter, created=about.created, root=about.folder, parent=name, max_model_len=length)
        for adapter, about in service.adapters.items()
    ]
    return [ModelCard(id=name, created=service.created, root=name, max_model_len=length), *adapters]
