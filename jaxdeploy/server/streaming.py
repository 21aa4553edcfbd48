"""Server-sent events (the HTML standard, section 9.2): the only place that knows how a stream is framed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from jaxdeploy.server.error_handlers import error_reply
from jaxdeploy.server.protocol.anthropic import StreamEvent

T = TypeVar("T")

PING_SECONDS = 15.0
"""Silence after which a comment is sent, so that nothing on the way closes the connection."""

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "the reply, or its pieces"}
}
"""What a route that can stream says of itself."""

LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        "description": "the reply, or its pieces",
    }
}
"""The same for a stream of lines."""


def event_stream(chunks: AsyncGenerator[BaseModel], ping_seconds: float = PING_SECONDS) -> StreamingResponse:
    """``chunks`` as events, then ``[DONE]``. A failure on the way is the last event, in the form of an error."""
    return StreamingResponse(_framed(chunks, ping_seconds), media_type="text/event-stream", headers=_HEADERS)


def named_event_stream(events: AsyncGenerator[StreamEvent], ping_seconds: float = PING_SECONDS) -> StreamingResponse:
    """``events`` with their types as names, as Anthropic streams."""
    return StreamingResponse(_named(events, ping_seconds), media_type="text/event-stream", headers=_HEADERS)


async def line_stream(chunks: AsyncGenerator[BaseModel]) -> StreamingResponse:
    """``chunks`` as JSON, one a line, as LMDeploy 0.3 streamed. A failure before the first one is raised."""
    first = await anext(chunks)

    async def lines() -> AsyncGenerator[str]:
        async with aclosing(chunks):
            yield f"{first.model_dump_json()}\n"
            try:
                async for chunk in chunks:
                    yield f"{chunk.model_dump_json()}\n"
            except Exception as error:  # headers are out: this is the only way to tell
                yield error_line(error)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def event(chunk: BaseModel) -> str:
    """One event."""
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def error_event(error: Exception) -> str:
    """How a stream ends that failed on the way."""
    return event(error_reply(error))


def named_error_event(error: Exception) -> str:
    """The same as Anthropic streams."""
    return f"event: error\ndata: {error_reply(error).model_dump_json()}\n\n"


def error_line(error: Exception) -> str:
    """The same in a stream of lines."""
    return f"{error_reply(error).model_dump_json()}\n"


async def _framed(chunks: AsyncGenerator[BaseModel], ping_seconds: float) -> AsyncGenerator[str]:
    async with aclosing(chunks), aclosing(with_pauses(chunks, ping_seconds)) as watched:
        try:
            async for chunk in watched:
                yield PING if chunk is None else event(chunk)
        except Exception as error:  # headers are out: this is the only way to tell
            yield error_event(error)
        else:
            yield DONE


async def _named(events: AsyncGenerator[StreamEvent], ping_seconds: float) -> AsyncGenerator[str]:
    async with aclosing(events), aclosing(with_pauses(events, ping_seconds)) as watched:
        try:
            async for made in watched:
                made = made or StreamEvent.of("ping")
                yield f"event: {made.type}\n{event(made)}"
        except Exception as error:  # headers are out: this is the only way to tell
            yield named_error_event(error)


async def with_pauses(items: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None]:
    """``items``, and ``None`` whenever nothing has come for so many seconds."""
    come: asyncio.Queue[T | _End] = asyncio.Queue()
    pump = asyncio.create_task(_pump(items, come))
    try:
        while True:
            try:
                async with asyncio.timeout(seconds):
                    item = await come.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        pump.cancel()
        await asyncio.wait({pump})


@dataclass(frozen=True)
class _End:
    error: Exception | None


async def _pump(items: AsyncIterator[T], queue: asyncio.Queue[T | _End]) -> None:
    try:
        async for item in items:
            queue.put_nowait(item)
    except Exception as error:
        queue.put_nowait(_End(error))
    else:
        queue.put_nowait(_End(None))
