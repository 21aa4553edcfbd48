"""What the proxy answers clients itself, and the list of routes that it forwards."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from jaxdeploy.server.errors import NoNodeError, UnknownModelError
from jaxdeploy.server.protocol.models import AnthropicModelList
from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.proxy import Proxy
from jaxdeploy.server.proxy.reply import Relayed

router = APIRouter()

FORWARDED = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/chat/interactive"),
    ("POST", "/v1/encode"),
    ("POST", "/generate"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
)
"""Method and path of everything that is sent to a node. A request has to match one of them byte by byte."""

_ID = re.compile(r"[\w-]{1,128}", re.ASCII)


def the_proxy(request: Request) -> Proxy:
    """The proxy of the application."""
    proxy: Proxy = request.app.state.proxy
    return proxy


TheProxy = Annotated[Proxy, Depends(the_proxy)]


class Health(BaseModel):
    """Replies can be expected."""

    status: Literal["healthy"] = "healthy"


@router.get("/health", tags=["operation"])
async def health(proxy: TheProxy) -> Health:
    """Whether any node is up. Answered without an API key."""
    if not proxy.nodes.up:
        raise NoNodeError("no node is up; start one, or see /nodes/status")
    return Health()


@router.get("/v1/models", tags=["models"])
async def models(proxy: TheProxy) -> dict[str, Any]:
    """The models of all nodes that are up."""
    return {"object": "list", "data": list(proxy.nodes.models().values())}


@router.get("/v1/models/{name:path}", tags=["models"])
async def model(name: str, proxy: TheProxy) -> dict[str, Any]:
    """One of them."""
    card = proxy.nodes.models().get(name)
    if card is None:
        raise UnknownModelError(f"model={name!r:.80} is not served here; see /v1/models")
    return card


@router.get("/anthropic/v1/models", tags=["models"])
async def anthropic_models(proxy: TheProxy) -> AnthropicModelList:
    """The models of all nodes that are up, as Anthropic lists them."""
    return AnthropicModelList.of((name, card.get("created") or 0) for name, card in proxy.nodes.models().items())


async def forward(request: Request, proxy: TheProxy, response_id: str = "") -> Response:
    """Send the request to a node. The path that the node sees is that of the list, with a checked id filled in."""
    path = request.scope["route"].path
    if response_id and not _ID.fullmatch(response_id):
        raise HTTPException(404, "this is no id of a response")
    path = path.replace("{response_id}", response_id)
    if request.scope["raw_path"] != path.encode():
        raise HTTPException(404, "the path has to be written as it is documented")
    return Relayed(partial(proxy.forwarder.forward, await Asked.read(request, path)))


for _method, _path in FORWARDED:
    router.add_api_route(_path, forward, methods=[_method], include_in_schema=False)
