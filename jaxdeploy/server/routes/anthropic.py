"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.messages import FinishReason
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.conversation import ParsedReply, chat_replies, chat_requests
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Text, Thought
from jaxdeploy.server.protocol.anthropic import (
    AnthropicUsage,
    CountRequest,
    MessagesReply,
    MessagesRequest,
    StopReason,
    TokenCount,
)
from jaxdeploy.server.protocol.chat import ChatRequest
from jaxdeploy.server.protocol.stream_event import StreamEvent
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.streaming import NAMED_PING, STREAMS, named_event_stream

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages", response_model=MessagesReply, responses=STREAMS)
async def messages(
    asked: MessagesRequest, request: Request, service: Model, caller: Caller, reply_id: ReplyId
) -> MessagesReply | StreamingResponse:
    """Go on with a conversation."""
    adapter = service.adapter_of(asked.model)
    chat = asked.chat_request()
    context = caller.context(f"msg_{reply_id}", user=chat.tenant, adapter=adapter)
    requests = await while_connected(request, chat_requests(service, chat, context))
    replies = chat_replies(service, chat, requests, context, stream=bool(asked.stream))
    if asked.stream:
        replies.check_room()
        return named_event_stream(_Stream(chat, replies).events(), ping=NAMED_PING)
    return await while_connected(request, _whole(chat, replies))


@router.post("/v1/messages/count_tokens")
async def count_tokens(asked: CountRequest, request: Request, service: Model) -> TokenCount:
    """How many tokens a conversation has as the model reads it."""
    service.check_model(asked.model)
    chat = ChatRequest(**asked.chat_fields())
    (counted,) = await while_connected(request, chat_requests(service, chat, RequestContext("")))
    return TokenCount(input_tokens=len(counted.prompt_token_ids))


async def _whole(chat: ChatRequest, replies: Replies[ParsedReply]) -> MessagesReply:
    (reply,) = await replies.whole()
    return MessagesReply(
        id=replies.context.request_id,
        model=replies.model,
        content=_blocks(reply),
        stop_reason=_stop_reason(chat, reply),
        stop_sequence=_stop_sequence(chat, reply),
        usage=_usage(replies),
    )


class _Stream:
    """A reply as Anthropic's events: one block after the other, each begun, filled and ended."""

    def __init__(self, chat: ChatRequest, replies: Replies[ParsedReply]) -> None:
        self._chat, self._replies = chat, replies
        self._blocks = 0
        self._open: str | None = None

    async def events(self) -> AsyncGenerator[StreamEvent]:
        """From ``message_start`` to ``message_stop``."""
        begun = MessagesReply(
            id=self._replies.context.request_id,
            model=self._replies.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=_usage(self._replies),
        )
        yield StreamEvent.of("message_start", message=begun.model_dump())
        (reply,) = self._replies.replies
        async with aclosing(self._replies.outputs()) as outputs:
            async for _ in outputs:
                for event in reply.events:
                    for made in self._events(event):
                        yield made
        for made in self._end_block():
            yield made
        ended = {
            "stop_reason": _stop_reason(self._chat, reply),
            "stop_sequence": _stop_sequence(self._chat, reply),
        }
        usage = _usage(self._replies).model_dump()
        yield StreamEvent.of("message_delta", delta=ended, usage=usage)
        yield StreamEvent.of("message_stop")

    def _events(self, event: Event) -> list[StreamEvent]:
        match event:
            case Text(text):
                return [*self._in_block("text", {"text": ""}), self._delta("text_delta", text=text)]
            case Thought(text):
                begun = self._in_block("thinking", {"thinking": "", "signature": ""})
                return [*begun, self._delta("thinking_delta", thinking=text)]
            case CallBegins(_, name):
                return self._begin("tool_use", {"id": _call_id(), "name": name, "input": {}})
            case CallArguments(_, piece):
                return [self._delta("input_json_delta", partial_json=piece)]

    def _in_block(self, kind: str, empty: dict[str, Any]) -> list[StreamEvent]:
        return [] if self._open == kind else self._begin(kind, empty)

    def _begin(self, kind: str, empty: dict[str, Any]) -> list[StreamEvent]:
        ended, self._open = self._end_block(), kind
        block = {"type": kind, **empty}
        begun = StreamEvent.of("content_block_start", index=self._blocks, content_block=block)
        return [*ended, begun]

    def _end_block(self) -> list[StreamEvent]:
        if self._open is None:
            return []
        self._open = None
        self._blocks += 1
        return [StreamEvent.of("content_block_stop", index=self._blocks - 1)]

    def _delta(self, kind: str, **what: str) -> StreamEvent:
        delta = {"type": kind, **what}
        return StreamEvent.of("content_block_delta", index=self._blocks, delta=delta)


def _blocks(reply: ParsedReply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.thought:
        blocks.append({"type": "thinking", "thinking": reply.thought, "signature": ""})
    if reply.text:
        blocks.append({"type": "text", "text": reply.text})
    blocks += [
        {"type": "tool_use", "id": _call_id(), "name": name, "input": _input(text)} for name, text in reply.calls
    ]
    return blocks


def _stop_reason(chat: ChatRequest, reply: ParsedReply) -> StopReason:
    if reply.finish_reason is FinishReason.LENGTH:
        return "max_tokens"
    if _stop_sequence(chat, reply) is not None:
        return "stop_sequence"
    return "tool_use" if reply.parser.num_calls else "end_turn"


def _stop_sequence(chat: ChatRequest, reply: ParsedReply) -> str | None:
    """Return the stop word, if it is one of the request's."""
    return reply.stop_word if reply.stop_word in chat.stop_words else None


def _usage(replies: Replies[ParsedReply]) -> AnthropicUsage:
    counted = replies.usage
    cached = counted.prompt_tokens_details.cached_tokens
    return AnthropicUsage(
        input_tokens=counted.prompt_tokens - cached,
        output_tokens=counted.completion_tokens,
        cache_read_input_tokens=cached,
    )


def _input(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _call_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"
