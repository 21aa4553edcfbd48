"""``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.messages import FinishReason, TextOutput
from jaxdeploy.server.conversation import ParsedReply, chat_replies, chat_requests
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.logprobs import chat_logprobs
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
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.streaming import STREAMS, event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatReply, response_model_exclude_unset=True, responses=STREAMS)
async def chat_completions(
    asked: ChatRequest, request: Request, service: Model, caller: Caller, reply_id: ReplyId
) -> ChatReply | StreamingResponse:
    """Go on with a conversation."""
    adapter = service.adapter_of(asked.model)
    service.check_number(asked.n or 1)
    context = caller.context(
        f"chatcmpl-{reply_id}",
        user=asked.tenant,
        priority=asked.priority,
        session_id=asked.session_id,
        adapter=adapter,
    )
    requests = await while_connected(request, chat_requests(service, asked, context))
    job = _Job(asked, chat_replies(service, asked, requests, context, stream=bool(asked.stream)))
    if asked.stream:
        job.replies.check_room()
        return event_stream(job.chunks(), ping=job.silence)
    return await while_connected(request, job.whole())


class _Job:
    """``replies`` in OpenAI's form."""

    def __init__(self, asked: ChatRequest, replies: Replies[ParsedReply]) -> None:
        self.replies = replies
        self._asked, self._tokenizer = asked, replies.service.tokenizer
        self._created = int(time.time())
        self._with_usage = asked.stream_options is not None and asked.stream_options.include_usage

    async def whole(self) -> ChatReply:
        """Return all replies in one answer."""
        whole = await self.replies.whole()
        return ChatReply(
            id=self.replies.context.request_id,
            object="chat.completion",
            created=self._created,
            model=self.replies.model,
            choices=[self._choice(index, reply) for index, reply in enumerate(whole)],
            usage=self.replies.usage,
        )

    async def chunks(self) -> AsyncGenerator[ChatChunk]:
        """Yield the role of each reply, its text as it arrives, and at the end the usage if it was asked for."""
        for index in range(len(self.replies.requests)):
            yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None))
        async with aclosing(self.replies.outputs()) as outputs:
            async for index, output in outputs:
                for choice in self._choices_of(index, output):
                    yield self._chunk(choice)
        if self._with_usage:
            yield self._chunk()

    def silence(self) -> ChatChunk:
        """Return a chunk that adds nothing."""
        return self._chunk(ChunkChoice(index=0, delta=Delta(), finish_reason=None))

    def _choice(self, index: int, reply: ParsedReply) -> Choice:
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

    def _choices_of(self, index: int, output: TextOutput) -> list[ChunkChoice]:
        """Return a choice for each event of an output. The first has the log-probabilities, the last the reason."""
        deltas = [_delta(event) for event in self.replies.replies[index].events]
        reason = None if output.finish_reason is None else self._finish_reason(index, output.finish_reason)
        logprobs = output.logprobs if self._asked.logprobs else ()
        if not deltas and (logprobs or reason):
            deltas = [Delta()]
        choices = [ChunkChoice(index=index, delta=delta, finish_reason=None) for delta in deltas]
        if logprobs:
            choices[0].logprobs = chat_logprobs(self._tokenizer, logprobs)
        if choices:
            choices[-1].finish_reason = reason
        return choices

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str:
        calls = self.replies.replies[index].parser.num_calls
        return "tool_calls" if reason is FinishReason.STOP and calls else str(reason)

    def _chunk(self, *choices: ChunkChoice) -> ChatChunk:
        chunk = ChatChunk(
            id=self.replies.context.request_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self.replies.model,
            choices=list(choices),
        )
        if self._with_usage:
            chunk.usage = None if choices else self.replies.usage
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
