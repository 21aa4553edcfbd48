"""``/v1/chat/completions``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.engine.generator import TextOutput
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import FinishReason, TokenLogprob
from jaxdeploy.server.call_grammar import call_grammar
from jaxdeploy.server.collected import Counts, chat_logprobs
from jaxdeploy.server.dependencies import Model, RequestId, while_connected
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
    Message,
    Reply,
    ToolCall,
)
from jaxdeploy.server.reading import Reading, parsers_for
from jaxdeploy.server.served import Origin, Prompt, Served
from jaxdeploy.server.streaming import STREAMS, event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatReply, response_model_exclude_unset=True, responses=STREAMS)
async def chat_completions(
    asked: ChatRequest, request: Request, served: Model, request_id: RequestId
) -> ChatReply | StreamingResponse:
    """Go on with a conversation."""
    served.check_model(asked.model)
    prompt = await _prompt(served, asked)
    job = _Job(served, asked, prompt, Origin(f"chatcmpl-{request_id}", asked.tenant, asked.priority, asked.session))
    if asked.stream:
        served.check_room([prompt])
        return event_stream(job.chunks())
    return await while_connected(request, job.whole())


async def _prompt(served: Served, asked: ChatRequest) -> Prompt:
    variables = dict(asked.chat_template_kwargs or {})
    calls = None
    if asked.may_call:
        if served.tool_form is None:
            raise RequestError("tools: the model has no known form of calls; start the server with --tool-call-parser")
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
    if asked.may_call and asked.must_call and served.tool_form is not None:
        several = asked.parallel_tool_calls is not False and asked.tool_choice == "required"
        calls = call_grammar(served.tool_form, asked.functions_to_call, served.tokenizer, several=several)
    ids = await served.chat_ids([template_message(message) for message in asked.messages], **variables)
    return await served.resolved(ids, asked.generation(calls), chat=True)


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates want it: the arguments of calls are objects there, not texts."""
    plain = message.model_dump(exclude_none=True)
    for call in plain.get("tool_calls", []):
        call["function"]["arguments"] = _object(call["function"]["arguments"])
    return plain


class _Job:
    """The replies to one request."""

    def __init__(self, served: Served, asked: ChatRequest, prompt: Prompt, origin: Origin) -> None:
        self._served, self._asked, self._prompt, self._origin = served, asked, prompt, origin
        self._created = int(time.time())
        self._counts = Counts(len(prompt.ids))
        thinking = served.reasoning_form is not None and served.ends_with(prompt.ids, served.reasoning_form.BEGIN)
        form = served.tool_form if asked.may_call else None
        self._readings = [
            Reading(
                parsers_for(form, served.reasoning_form, thinking=thinking),
                one_call=asked.parallel_tool_calls is False,
            )
            for _ in range(prompt.how.n)
        ]

    async def whole(self) -> ChatReply:
        """All of them in one answer."""
        replies = [_Growing() for _ in self._readings]
        async with aclosing(self._served.replies([self._prompt], self._origin)) as pieces:
            async for index, output in pieces:
                self._counts.add(index, output)
                replies[index].add(output, self._read(index, output))
        return ChatReply(
            id=self._origin.request_id,
            object="chat.completion",
            created=self._created,
            model=self._served.name,
            choices=[self._choice(index, reply) for index, reply in enumerate(replies)],
            usage=self._counts.usage,
        )

    async def chunks(self) -> AsyncGenerator[ChatChunk]:
        """Who speaks, then what is said, then, where it was asked for, what it took."""
        options = self._asked.stream_options
        for index in range(len(self._readings)):
            yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None))
        async with aclosing(self._served.replies([self._prompt], self._origin)) as pieces:
            async for index, output in pieces:
                self._counts.add(index, output)
                for choice in self._pieces(index, output):
                    yield self._chunk(choice)
        if options and options.include_usage:
            yield self._chunk()

    def _read(self, index: int, output: TextOutput) -> list[Event]:
        return self._readings[index].push(output.text, ends=output.finish_reason is not None)

    def _choice(self, index: int, reply: _Growing) -> Choice:
        message = Reply(role="assistant", content=reply.text or (None if reply.calls else ""), refusal=None)
        if reply.thought:
            message.reasoning_content = reply.thought
        if reply.calls:
            message.tool_calls = reply.calls
        reason = self._finish_reason(index, reply.finish_reason)
        logprobs = chat_logprobs(self._served.tokenizer, reply.logprobs) if self._asked.logprobs else None
        return Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason)

    def _pieces(self, index: int, output: TextOutput) -> Iterator[ChunkChoice]:
        """What an output adds: a chunk for each event, log-probabilities with the first, why it ended with the last."""
        deltas = [_delta(event) for event in self._read(index, output)]
        reason = None if output.finish_reason is None else self._finish_reason(index, output.finish_reason)
        wanted = self._asked.logprobs and output.logprobs
        if not deltas and (wanted or reason):
            deltas = [Delta()]
        for at, delta in enumerate(deltas):
            last = reason if at + 1 == len(deltas) else None
            choice = ChunkChoice(index=index, delta=delta, finish_reason=last)
            if wanted and at == 0:
                choice.logprobs = chat_logprobs(self._served.tokenizer, list(output.logprobs))
            yield choice

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str:
        return "tool_calls" if reason is FinishReason.STOP and self._readings[index].calls else str(reason)

    def _chunk(self, *choices: ChunkChoice) -> ChatChunk:
        chunk = ChatChunk(
            id=self._origin.request_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._served.name,
            choices=list(choices),
        )
        options = self._asked.stream_options
        if options and options.include_usage:
            chunk.usage = None if choices else self._counts.usage
        return chunk


class _Growing:
    """A reply as far as it has come."""

    def __init__(self) -> None:
        self.text = self.thought = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None

    def add(self, output: TextOutput, events: list[Event]) -> None:
        """A piece has come, and means ``events``."""
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        for event in events:
            match event:
                case Text(text):
                    self.text += text
                case Thought(text):
                    self.thought += text
                case CallBegins(_, name):
                    self.calls.append(
                        ToolCall(id=_call_id(), type="function", function=CalledFunction(name=name, arguments=""))
                    )
                case CallArguments(index, piece):
                    self.calls[index].function.arguments += piece


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


def _object(text: str) -> Any:
    """What a call's arguments say; as they are where they are no JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, Mapping) else text
