"""What the proxy answers itself, and what it passes on."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from jaxdeploy.errors import RequestError
from jaxdeploy.server.errors import NoNodeError, UnknownModelError
from jaxdeploy.server.metrics import CONTENT_TYPE
from jaxdeploy.server.protocol.models import AnthropicModelList
from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.nodes import Node
from jaxdeploy.server.proxy.proxy import Proxy
from jaxdeploy.server.proxy.reply import Relayed

router = APIRouter()

PASSED_ON = ("v1/", "generate", "tokenize", "detokenize", "tokenizer_info")
"""How paths begin that are the nodes'; what else a server may have is for its operator."""
OF_OPERATORS = frozenset({"v1/load_lora_adapter", "v1/unload_lora_adapter"})
"""Paths that begin so, and are for the operator all the same: they are about one node."""


def _proxy(request: Request) -> Proxy:
    proxy: Proxy = request.app.state.proxy
    return proxy


TheProxy = Annotated[Proxy, Depends(_proxy)]


class NodeAddress(BaseModel):
    """A server; other fields, which LMDeploy's nodes send, change nothing."""

    url: str = Field(max_length=2048, examples=["http://127.0.0.1:23333"])


class NodeStatus(BaseModel):
    """How a node stands; ``latency`` and ``heartbeat_age`` are in seconds, ``None`` where there was none yet."""

    up: bool
    why_down: str | None
    models: list[str]
    in_flight: int
    latency: float | None
    heartbeat_age: float | None


class Health(BaseModel):
    """Replies can be expected."""

    status: Literal["healthy"] = "healthy"


@router.post("/nodes/add", tags=["nodes"])
async def add_node(asked: NodeAddress, proxy: TheProxy) -> dict[str, NodeStatus]:
    """Send requests to a server, from now on or as soon as it is up. Again for one that is known: look at it now."""
    node = proxy.nodes.add(asked.url)
    await proxy.heartbeats.watch(node)
    return {node.url: _status(node)}


@router.post("/nodes/remove", tags=["nodes"])
async def remove_node(
    proxy: TheProxy, asked: NodeAddress | None = None, node_url: str | None = None
) -> dict[str, bool]:
    """Send no more requests to a server; those that it has are finished. LMDeploy 0.3 has its address in the query."""
    url = node_url if asked is None else asked.url
    if url is None:
        raise RequestError("url is missing; add it")
    return {"removed": proxy.nodes.remove(url)}


@router.get("/nodes/status", tags=["nodes"])
async def nodes_status(proxy: TheProxy) -> dict[str, NodeStatus]:
    """All nodes by their address."""
    return {node.url: _status(node) for node in proxy.nodes}


@router.get("/health", tags=["operation"])
async def health(proxy: TheProxy) -> Health:
    """Whether any node is up. Answered without an API key."""
    if not proxy.nodes.up:
        raise NoNodeError("no node is up; start one, or see /nodes/status")
    return Health()


@router.get("/metrics", response_class=PlainTextResponse, tags=["operation"])
async def metrics(proxy: TheProxy) -> PlainTextResponse:
    """Prometheus' text format."""
    return PlainTextResponse(proxy.metrics.text(proxy.nodes), media_type=CONTENT_TYPE)


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


@router.post("/abort_request", tags=["operation"])
async def abort_request(request: Request, proxy: TheProxy) -> dict[str, int]:
    """Tell all nodes to end a request, or all of them. How many replies ended is the answer."""
    asked = await Asked.read(request)
    answers = await asyncio.gather(*(proxy.forwarder.aborted(node, asked) for node in proxy.nodes.up))
    return {"aborted": sum(answers)}


@router.api_route("/{path:path}", methods=["GET", "POST"], include_in_schema=False)
async def pass_on(path: str, request: Request, proxy: TheProxy) -> Response:
    """Anything else that is asked of a model."""
    ours = not path.startswith(PASSED_ON) or path.strip("/") in OF_OPERATORS
    if ours or {".", ".."} & set(path.split("/")):
        raise HTTPException(404, "no route of the proxy, and not passed on to its nodes")
    return Relayed(partial(proxy.forwarder.forward, await Asked.read(request)))


def _status(node: Node) -> NodeStatus:
    return NodeStatus(
        up=node.up,
        why_down=node.why_down,
        models=list(node.models),
        in_flight=node.in_flight,
        latency=node.latency,
        heartbeat_age=node.heartbeat_age,
    )
