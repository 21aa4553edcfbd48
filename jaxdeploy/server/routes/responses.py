"""``/v1/responses``: OpenAI's replies as items, which the server keeps unless it is told not to."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.messages import FinishReason, TextOutput
from jaxdeploy.messages import Request as Generation
from jaxdeploy.server.conversation import ParsedReply, chat_replies, chat_requests
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.error_handlers import error_reply
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Text, Thought
from jaxdeploy.server.protocol.response import (
    DeletedResponse,
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputThought,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponsesUsage,
)
from jaxdeploy.server.protocol.responses import Item, ItemStatus, MessageItem, ResponsesRequest, RetrieveQuery
from jaxdeploy.server.protocol.stream_event import StreamEvent
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.stored_responses import StoredResponse
from jaxdeploy.server.streaming import STREAMS, named_event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", response_model=Response, responses=STREAMS)
async def create_response(
    asked: ResponsesRequest, request: Request, service: Model, caller: Caller, reply_id: ReplyId
) -> Response | StreamingResponse:
    """Go on with a conversation, which may be that of an earlier response."""
    adapter = service.adapter_of(asked.model)
    previous = asked.previous_response_id
    before = () if previous is None else service.responses.find(previous, caller.owner).items
    chat = asked.chat_request(before)
    context = caller.context(f"resp_{reply_id}", user=chat.tenant, priority=chat.priority, adapter=adapter)
    requests = await while_connected(request, chat_requests(service, chat, context))
    replies = chat_replies(service, chat, requests, context, stream=bool(asked.stream))
    job = _Job(replies, _begun(asked, replies, requests[0]), (*before, *asked.input))
    if asked.stream:
        replies.check_room()
        return named_event_stream(job.stream())
    return await while_connected(request, job.whole())


@router.get("/v1/responses/{response_id}")
async def stored_response(
    response_id: str, how: Annotated[RetrieveQuery, Query()], service: Model, caller: Caller
) -> Response:
    """A response that is kept."""
    return service.responses.find(response_id, caller.owner).response


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, service: Model, caller: Caller) -> DeletedResponse:
    """Keep a response no longer; those that went on from it stay."""
    service.responses.forget(response_id, caller.owner)
    return DeletedResponse(id=response_id)


class _Job:
    """``replies``, of which there is one, as a response that continues the items ``before``."""

    def __init__(self, replies: Replies[ParsedReply], response: Response, before: Sequence[Item]) -> None:
        self._replies, self._response, self._before = replies, response, before
        self._output = _Output(response.output)
        self._unassigned_tokens = 0
        """Tokens since the last event: the next event shows whether they belong to a thought."""
        self._thought_tokens = 0
        self._count = 0
        """Events of the stream so far."""

    async def whole(self) -> Response:
        """Return the complete response."""
        async with aclosing(self._replies.outputs()) as outputs:
            async for _, output in outputs:
                self._take(output)
        self._end()
        return self._response

    async def stream(self) -> AsyncGenerator[StreamEvent]:
        """Yield events from ``response.created`` to the end.

        A failure is reported by two events, since clients expect one or the other.
        """
        try:
            for event in (self._tell("created"), self._tell("in_progress")):
                yield self._numbered(event)
            async with aclosing(self._replies.outputs()) as outputs:
                async for _, output in outputs:
                    for event in self._take(output):
                        yield self._numbered(event)
            for event in self._end():
                yield self._numbered(event)
        except Exception as error:  # the headers are sent: an event is the only way to report it
            for event in self._fail(error):
                yield self._numbered(event)

    def _take(self, output: TextOutput) -> list[StreamEvent]:
        """Return the events of an output that was added to the reply."""
        (reply,) = self._replies.replies
        self._unassigned_tokens += len(output.token_ids)
        if reply.events:
            if isinstance(reply.events[0], Thought):
                self._thought_tokens += self._unassigned_tokens
            self._unassigned_tokens = 0
        return [made for event in reply.events for made in self._output.push(event)]

    def _end(self) -> list[StreamEvent]:
        """Complete the response and return its last events."""
        (reply,) = self._replies.replies
        cut = reply.finish_reason is FinishReason.LENGTH
        response = self._response
        response.status = "incomplete" if cut else "completed"
        events = self._output.end(response.status)
        response.completed_at = None if cut else int(time.time())
        response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if cut else None
        response.usage = _usage(self._replies, self._thought_tokens)
        if response.store:
            items = _joined(self._before, response.items)
            stored = StoredResponse(response, items, self._replies.context.owner)
            self._replies.service.responses.keep(stored)
        return [*events, self._tell(response.status)]

    def _fail(self, error: Exception) -> list[StreamEvent]:
        """Mark the response as failed and return its last events."""
        told = error_reply(error).error
        self._output.end_item("incomplete")
        self._response.status = "failed"
        self._response.error = ResponseError(code=told.code or told.type, message=told.message)
        fields = told.model_dump(exclude={"type"})
        return [self._tell("failed"), StreamEvent.of("error", **fields, error=told.model_dump())]

    def _numbered(self, event: StreamEvent) -> StreamEvent:
        self._count += 1
        return event.model_copy(update={"sequence_number": self._count - 1})

    def _tell(self, what: str) -> StreamEvent:
        return StreamEvent.of(f"response.{what}", response=self._response.model_dump())


class _Output:
    """``items`` as they come, one after the other, each begun, filled and ended by events."""

    def __init__(self, items: list[OutputItem]) -> None:
        self._items = items
        self._open = False

    def push(self, event: Event) -> list[StreamEvent]:
        """What a piece of the reply adds."""
        match event:
            case Text(text):
                return [*self._in_item(OutputMessage, "msg"), self._add(text)]
            case Thought(text):
                return [*self._in_item(OutputReasoning, "rs"), self._add(text)]
            case CallBegins(_, name):
                return self._begin(OutputCall(id=_id("fc"), call_id=_id("call"), name=name))
            case CallArguments(_, piece):
                return [self._add(piece)]

    def end(self, status: ItemStatus) -> list[StreamEvent]:
        """Nothing follows. A reply without anything is an empty message."""
        begun = [] if self._items else self._in_item(OutputMessage, "msg")
        return [*begun, *self.end_item(status)]

    def end_item(self, status: ItemStatus) -> list[StreamEvent]:
        """The item that is open, if any, has come as far as it will."""
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        item.status = status
        if isinstance(item, OutputCall):
            return [self._tell_filling("done", arguments=item.arguments), self._tell_item("done")]
        part = item.content[0]
        return [self._tell_filling("done", text=part.text), self._tell_part("done", part), self._tell_item("done")]

    def _in_item(self, kind: type[OutputMessage | OutputReasoning], prefix: str) -> list[StreamEvent]:
        if self._open and isinstance(self._items[-1], kind):
            return []
        return self._begin(kind(id=_id(prefix)))

    def _begin(self, item: OutputItem) -> list[StreamEvent]:
        ended, self._open = self.end_item("completed"), True
        self._items.append(item)
        begun = [*ended, self._tell_item("added")]
        match item:
            case OutputMessage():
                item.content.append(OutputText())
            case OutputReasoning():
                item.content.append(OutputThought())
            case OutputCall():
                return begun
        return [*begun, self._tell_part("added", item.content[0])]

    def _add(self, piece: str) -> StreamEvent:
        match self._items[-1]:
            case OutputCall() as item:
                item.arguments += piece
            case OutputMessage() | OutputReasoning() as item:
                item.content[0].text += piece
        return self._tell_filling("delta", delta=piece)

    def _tell_item(self, what: str) -> StreamEvent:
        item = self._items[-1].model_dump()
        return StreamEvent.of(f"response.output_item.{what}", output_index=len(self._items) - 1, item=item)

    def _tell_part(self, what: str, part: OutputText | OutputThought) -> StreamEvent:
        return self._tell(f"content_part.{what}", content_index=0, part=part.model_dump())

    def _tell_filling(self, what: str, **fields: str) -> StreamEvent:
        match self._items[-1]:
            case OutputMessage():
                return self._tell(f"output_text.{what}", content_index=0, **fields, logprobs=[])
            case OutputReasoning():
                return self._tell(f"reasoning_text.{what}", content_index=0, **fields)
            case OutputCall():
                return self._tell(f"function_call_arguments.{what}", **fields)

    def _tell(self, what: str, **fields: Any) -> StreamEvent:
        place = {"item_id": self._items[-1].id, "output_index": len(self._items) - 1}
        return StreamEvent.of(f"response.{what}", **place, **fields)


def _begun(asked: ResponsesRequest, replies: Replies[ParsedReply], request: Generation) -> Response:
    """Return a response without output. Settings that the request leaves open have the values of the engine."""
    sampling = request.sampling
    form = asked.text.format if asked.text else None
    choice = asked.tool_choice or "auto"
    return Response(
        id=replies.context.request_id,
        created_at=int(time.time()),
        model=replies.model,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        prompt_cache_key=asked.prompt_cache_key,
        safety_identifier=asked.safety_identifier,
        store=asked.store is not False,
        temperature=sampling.temperature if asked.temperature is None else asked.temperature,
        text={"format": form or {"type": "text"}},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.echo() for tool in asked.tools or []],
        top_p=sampling.top_p if asked.top_p is None else asked.top_p,
        user=asked.user,
    )


def _joined(before: Sequence[Item], output: Sequence[Item]) -> tuple[Item, ...]:
    """The items of a conversation. A reply that went on from a message is one message with it."""
    last, first = before[-1], output[0]
    if isinstance(last, MessageItem) and last.role == "assistant" and isinstance(first, MessageItem):
        whole = last.model_copy(update={"content": [*last.content, *first.content]})
        return (*before[:-1], whole, *output[1:])
    return (*before, *output)


def _usage(replies: Replies[ParsedReply], thought_tokens: int) -> ResponsesUsage:
    counted = replies.usage
    return ResponsesUsage(
        input_tokens=counted.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=counted.prompt_tokens_details.cached_tokens),
        output_tokens=counted.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=thought_tokens),
        total_tokens=counted.total_tokens,
    )


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
