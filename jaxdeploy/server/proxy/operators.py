"""The routes of those who run the proxy: nodes come and go, and their figures. They need an operator's key."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from jaxdeploy.config import ProxyConfig, ServerConfig
from jaxdeploy.errors import RequestError
from jaxdeploy.server.errors import ForbiddenError
from jaxdeploy.server.metrics import CONTENT_TYPE
from jaxdeploy.server.proxy.asked import Asked
from jaxdeploy.server.proxy.nodes import MAX_URL_LENGTH, Node
from jaxdeploy.server.proxy.routes import TheProxy
from jaxdeploy.server.security import TENANT, Keys, key_of


@dataclass(frozen=True)
class Operators:
    """Access to the operators' routes: with one of ``keys``. If there are none: for all if ``open``, else closed."""

    keys: Keys | None
    open: bool

    @classmethod
    def of(cls, config: ProxyConfig, server_config: ServerConfig) -> Operators:
        """Without operators' keys the routes are open only if the proxy has no key of any kind to protect."""
        keys = Keys(config.operator_keys) if config.operator_keys else None
        return cls(keys, open=not (keys or server_config.api_keys or config.node_api_key))

    def check(self, request: Request) -> None:
        """Raise ``ForbiddenError``, or ``HTTPException`` 401 if the request has no key."""
        if self.open:
            return
        if self.keys is None:
            raise ForbiddenError(f"{request.url.path} is closed; start the proxy with --operator-keys KEY")
        key = key_of(request.headers)
        if not key:
            raise HTTPException(401, "an operator's key is missing; send it", {"WWW-Authenticate": "Bearer"})
        if not self.keys.include(key):
            raise ForbiddenError(f"{request.url.path} needs one of --operator-keys; send that key")


def _check(request: Request) -> None:
    operators: Operators = request.app.state.operators
    operators.check(request)


router = APIRouter(dependencies=[Depends(_check)])


class NodeAddress(BaseModel):
    """A server, and the key that the proxy shows it; other fields, which LMDeploy's nodes send, change nothing."""

    url: str = Field(max_length=MAX_URL_LENGTH, examples=["http://127.0.0.1:23333"])
    api_key: str | None = Field(None, min_length=1, max_length=512, pattern=r"^[!-~]+$")


class NodeStatus(BaseModel):
    """State of a node; ``latency`` and ``heartbeat_age`` are in seconds, ``None`` before the first measurement."""

    up: bool
    why_down: str | None
    models: list[str]
    in_flight: int
    latency: float | None
    heartbeat_age: float | None


@router.post("/nodes/add", tags=["nodes"])
async def add_node(asked: NodeAddress, proxy: TheProxy) -> dict[str, NodeStatus]:
    """Send requests to a server once it answers. A known server is checked again at once."""
    node = await proxy.register(asked.url, asked.api_key)
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
    """Return all nodes by their address."""
    return {node.url: _status(node) for node in proxy.nodes}


@router.get("/metrics", response_class=PlainTextResponse, tags=["operation"])
async def metrics(proxy: TheProxy) -> PlainTextResponse:
    """Prometheus' text format."""
    return PlainTextResponse(proxy.metrics.text(proxy.nodes), media_type=CONTENT_TYPE)


abort = APIRouter()


@abort.post("/abort_request", tags=["operation"])
async def abort_request(request: Request, proxy: TheProxy) -> dict[str, int]:
    """Send the abort to all nodes. Ending all requests needs an operator's key."""
    asked = await Asked.read(request, "/abort_request")
    if asked.fields.get("abort_all"):
        _check(request)
        asked.headers.pop(TENANT.encode(), None)  # those of all clients
    answers = await asyncio.gather(*(proxy.forwarder.aborted(node, asked) for node in proxy.nodes.up))
    return {"aborted": sum(answers)}


def _status(node: Node) -> NodeStatus:
    return NodeStatus(
        up=node.up,
        why_down=node.why_down,
        models=list(node.models),
        in_flight=node.in_flight,
        latency=node.latency,
        heartbeat_age=node.heartbeat_age,
    )
