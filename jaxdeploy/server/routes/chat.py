"""``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.engine.front.generator import TextOutput
from jaxdeploy.messages import FinishReason
from jaxdeploy.server.collected import chat_logprobs
from jaxdeploy.server.conversation import Replies, WholeReply, chat_prompt
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Text, Thought
from jaxdeploy.server.protocol.chat import (
    CallDelta,
    CalledFunction,
    ChatChunk,
    ChatReply,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    Reply,
    ToolCall,
)
from jaxdeploy.server.streaming import STREAMS, event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatReply, response_model_exclude_unset=True, responses=STREAMS)
async def chat_completions(
    asked: ChatRequest, request: Request, served: Model, caller: Caller, reply_id: ReplyId
) -> ChatReply | StreamingResponse:
    """Go on with a conversation."""
    adapter = served.adapter_of(asked.model)
    served.check_number(asked.n or 1)
    origin = caller.origin(
        f"chatcmpl-{reply_id}",
        user=asked.tenant,
        priority=asked.priority,
        session_id=asked.session_id,
        adapter=adapter,
    )
    prompt = await while_connected(request, chat_prompt(served, asked))
    job = _Job(Replies(served, asked, prompt, origin))
    if asked.stream:
        job.replies.check_room()
        return event_stream(job.chunks(), ping=job.silence())
    return await while_connected(request, job.whole())


class _Job:
    """``replies`` in OpenAI's form."""

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self._asked, self._tokenizer = replies.asked, replies.served.tokenizer
        self._created = int(time.time())
        options = replies.asked.stream_options
        self._with_usage = options is not None and options.include_usage

    async def whole(self) -> ChatReply:
        """All of them in one answer."""
        whole = await self.replies.whole()
        return ChatReply(
            id=self.replies.origin.request_id,
            object="chat.completion",
            created=self._created,
            model=self.replies.model,
            choices=[self._choice(index, reply) for index, reply in enumerate(whole)],
            usage=self.replies.counts.usage,
        )

    async def chunks(self) -> AsyncGenerator[ChatChunk]:
        """Who speaks, then what is said, then, where it was asked for, what it took."""
        for index in range(len(self.replies)):
            yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None))
        async with aclosing(self.replies.pieces()) as pieces:
            async for index, output, events in pieces:
                for choice in self._pieces(index, output, events):
                    yield self._chunk(choice)
        if self._with_usage:
            yield self._chunk()

    def silence(self) -> ChatChunk:
        """A chunk that adds nothing."""
        return self._chunk(ChunkChoice(index=0, delta=Delta(), finish_reason=None))

    def _choice(self, index: int, reply: WholeReply) -> Choice:
        message = Reply(role="assistant", content=reply.text or (None if reply.calls else ""), refusal=None)
        if reply.thought:
            message.reasoning_content = reply.thought
        if reply.calls:
            message.tool_calls = [
                ToolCall(id=_call_id(), type="function", function=CalledFunction(name=name, arguments=arguments))
                for name, arguments in reply.calls
            ]
        logprobs = chat_logprobs(self._tokenizer, reply.logprobs) if self._asked.logprobs else None
        reason = self._finish_reason(index, reply.finish_reason)
        return Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason)

    def _pieces(self, index: int, output: TextOutput, events: list[Event]) -> Iterator[ChunkChoice]:
        """What an output adds: a chunk for each event, log-probabilities with the first, why it ended with the last."""
        deltas = [_delta(event) for event in events]
        reason = None if output.finish_reason is None else self._finish_reason(index, output.finish_reason)
        wanted = self._asked.logprobs and output.logprobs
        if not deltas and (wanted or reason):
            deltas = [Delta()]
        for at, delta in enumerate(deltas):
            last = reason if at + 1 == len(deltas) else None
            choice = ChunkChoice(index=index, delta=delta, finish_reason=last)
            if wanted and at == 0:
                choice.logprobs = chat_logprobs(self._tokenizer, list(output.logprobs))
            yield choice

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str:
        return "tool_calls" if reason is FinishReason.STOP and self.replies.has_called(index) else str(reason)

    def _chunk(self, *choices: ChunkChoice) -> ChatChunk:
        chunk = ChatChunk(
            id=self.replies.origin.request_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self.replies.model,
            choices=list(choices),
        )
        if self._with_usage:
            chunk.usage = None if choices else self.replies.counts.usage
        return chunk


def _delta(event: Event) -> Delta:
    match event:
        case Text(text):
            return Delta(content=text)
        case Thought(text):
            return Delta(reasoning_content=text)
        case CallBegins(index, name):
            function = {"name": name, "arguments": ""}
            return Delta(tool_calls=[CallDelta(index=index, id=_call_id(), type="function", function=function)])
        case CallArguments(index, piece):
            return Delta(tool_calls=[CallDelta(index=index, function={"arguments": piece})])


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
