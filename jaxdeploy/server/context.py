"""What a request is in addition to its prompts and settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestContext:
    """Who sent a request, and how it is scheduled.

    request_id: id of the request in replies and logs.
    tenant: the engine is shared fairly between tenants.
    priority: requests with a lower value are scheduled first.
    session_id: a conversation whose cached blocks are reused.
    adapter: the LoRA adapter that the request asks for.
    owner: the key of the request if keys are separated. Requests of different owners share no cached prompts and
        cannot abort each other.
    """

    request_id: str
    tenant: str = ""
    priority: int = 0
    session_id: str | None = None
    adapter: str | None = None
    owner: str = ""
