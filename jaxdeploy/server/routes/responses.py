"""``/v1/responses``: OpenAI's replies as items, which the server keeps unless it is told not to."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.messages import FinishReason
from jaxdeploy.server.conversation import Replies, chat_prompt
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.error_handlers import error_reply
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Text, Thought
from jaxdeploy.server.protocol.responses import (
    DeletedResponse,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemStatus,
    MessageItem,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputThought,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponsesUsage,
    RetrieveQuery,
)
from jaxdeploy.server.protocol.stream_event import StreamEvent
from jaxdeploy.server.served import Prompt
from jaxdeploy.server.stored_responses import StoredResponse
from jaxdeploy.server.streaming import STREAMS, named_event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", response_model=Response, responses=STREAMS)
async def create_response(
    asked: ResponsesRequest, request: Request, served: Model, caller: Caller, reply_id: ReplyId
) -> Response | StreamingResponse:
    """Go on with a conversation, which may be that of an earlier response."""
    adapter = served.adapter_of(asked.model)
    previous = asked.previous_response_id
    before = () if previous is None else served.responses.find(previous, caller.owner).items
    chat = asked.chat_request(before)
    prompt = await while_connected(request, chat_prompt(served, chat))
    origin = caller.origin(f"resp_{reply_id}", user=chat.tenant, priority=chat.priority, adapter=adapter)
    replies = Replies(served, chat, prompt, origin)
    job = _Job(replies, _begun(asked, replies, prompt), (*before, *asked.input))
    if asked.stream:
        replies.check_room()
        return named_event_stream(job.stream())
    return await while_connected(request, job.whole())


@router.get("/v1/responses/{response_id}")
async def stored_response(
    response_id: str, how: Annotated[RetrieveQuery, Query()], served: Model, caller: Caller
) -> Response:
    """A response that is kept."""
    return served.responses.find(response_id, caller.owner).response


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, served: Model, caller: Caller) -> DeletedResponse:
    """Keep a response no longer; those that went on from it stay."""
    served.responses.forget(response_id, caller.owner)
    return DeletedResponse(id=response_id)


class _Job:
    """``replies``, of which there is one, as a response that goes on from the items ``before``."""

    def __init__(self, replies: Replies, response: Response, before: Sequence[Item]) -> None:
        self._replies, self._response, self._before = replies, response, before
        self._output = _Output(response.output)
        self._thought_tokens = 0

    async def whole(self) -> Response:
        """All of it in one answer."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self._response

    async def stream(self) -> AsyncGenerator[StreamEvent]:
        """From ``response.created`` to the end. A failure is told twice, for clients look for one or the other."""
        count = 0
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield _numbered(event, count)
                    count += 1
        except Exception as error:  # headers are out: this is the only way to tell
            told = error_reply(error).error
            self._output.end_item("incomplete")
            self._response.status = "failed"
            self._response.error = ResponseError(code=told.code or told.type, message=told.message)
            yield _numbered(self._tell("failed"), count)
            fields = told.model_dump(exclude={"type"})
            yield _numbered(StreamEvent.of("error", **fields, error=told.model_dump()), count + 1)

    async def _events(self) -> AsyncGenerator[StreamEvent]:
        yield self._tell("created")
        yield self._tell("in_progress")
        reason, tokens = None, 0
        async with aclosing(self._replies.pieces()) as pieces:
            async for _, output, events in pieces:
                tokens += len(output.token_ids)
                if events:
                    self._thought_tokens += tokens if isinstance(events[0], Thought) else 0
                    tokens = 0
                for event in events:
                    for made in self._output.push(event):
                        yield made
                reason = output.finish_reason
        for made in self._end(cut=reason is FinishReason.LENGTH):
            yield made

    def _end(self, *, cut: bool) -> list[StreamEvent]:
        """The last events; ``cut``: the reply was longer than it might be."""
        response = self._response
        response.status = "incomplete" if cut else "completed"
        events = self._output.end(response.status)
        response.completed_at = None if cut else int(time.time())
        response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if cut else None
        response.usage = _usage(self._replies, self._thought_tokens)
        if response.store:
            items = _joined(self._before, response.items)
            self._replies.served.responses.keep(StoredResponse(response, items, self._replies.origin.owner))
        return [*events, self._tell(response.status)]

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


def _begun(asked: ResponsesRequest, replies: Replies, prompt: Prompt) -> Response:
    """A response without output; what the request left open is what the engine takes."""
    sampling = prompt.how.sampling
    form = asked.text.format if asked.text else None
    choice = asked.tool_choice or "auto"
    return Response(
        id=replies.origin.request_id,
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


def _usage(replies: Replies, thought_tokens: int) -> ResponsesUsage:
    counted = replies.counts.usage
    return ResponsesUsage(
        input_tokens=counted.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=counted.prompt_tokens_details.cached_tokens),
        output_tokens=counted.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=thought_tokens),
        total_tokens=counted.total_tokens,
    )


def _numbered(event: StreamEvent, number: int) -> StreamEvent:
    return event.model_copy(update={"sequence_number": number})


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
