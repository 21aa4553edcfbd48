"""From a conversation to its replies: what the chat routes of all APIs share."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from jaxdeploy.engine.generator import TextOutput
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import FinishReason, TokenLogprob
from jaxdeploy.server.call_grammar import call_grammar
from jaxdeploy.server.collected import Counts
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Text, Thought
from jaxdeploy.server.protocol.chat import ChatRequest, Message
from jaxdeploy.server.reading import Reading, parsers_for
from jaxdeploy.server.served import Origin, Prompt, Served


async def chat_prompt(served: Served, asked: ChatRequest) -> Prompt:
    """Token ids of the conversation, and how to go on with it. Raises ``RequestError``."""
    variables = dict(asked.chat_template_kwargs or {})
    calls = None
    if asked.may_call:
        if served.tool_form is None:
            raise RequestError("tools: the model has no known form of calls; start the server with --tool-call-parser")
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
        if asked.must_call:
            several = asked.parallel_tool_calls is not False and asked.tool_choice == "required"
            calls = call_grammar(served.tool_form, asked.functions_to_call, served.tokenizer, several=several)
    ids = await served.chat_ids([_for_template(message) for message in asked.messages], **variables)
    return await served.resolved(ids, asked.generation(calls), chat=True)


class Replies:
    """The replies to one request, read as they come. ``counts`` are tokens so far."""

    def __init__(self, served: Served, asked: ChatRequest, prompt: Prompt, origin: Origin) -> None:
        self.served, self.asked, self.origin = served, asked, origin
        self.counts = Counts(len(prompt.ids), prompt.how.n)
        self._prompt = prompt
        thinking = served.reasoning_form is not None and served.ends_with(prompt.ids, served.reasoning_form.BEGIN)
        form = served.tool_form if asked.may_call else None
        one_call = asked.parallel_tool_calls is False
        self._readings = [
            Reading(parsers_for(form, served.reasoning_form, thinking=thinking), one_call=one_call)
            for _ in range(prompt.how.n)
        ]

    def __len__(self) -> int:
        return len(self._readings)

    @property
    def model(self) -> str:
        """Who replies."""
        return self.served.model_of(self.origin)

    def check_room(self) -> None:
        """Raise ``OverloadedError`` if they are too many now."""
        self.served.check_room([self._prompt])

    async def pieces(self) -> AsyncGenerator[tuple[int, TextOutput, list[Event]]]:
        """Each piece with the index of its reply, and what it means."""
        async with aclosing(self.served.replies([self._prompt], self.origin)) as outputs:
            async for index, output in outputs:
                self.counts.add(index, output)
                yield index, output, self._readings[index].push(output.text, ends=output.finish_reason is not None)

    async def whole(self) -> list[WholeReply]:
        """All of them, complete."""
        replies = [WholeReply() for _ in self._readings]
        async with aclosing(self.pieces()) as pieces:
            async for index, output, events in pieces:
                replies[index].add(output, events)
        return replies

    def has_called(self, index: int) -> bool:
        """Whether a reply has made a call."""
        return self._readings[index].calls > 0


class WholeReply:
    """A reply as far as it has come; ``calls`` are names and arguments (JSON)."""

    def __init__(self) -> None:
        self.text = self.thought = ""
        self.calls: list[tuple[str, str]] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop_word: str | None = None

    def add(self, output: TextOutput, events: list[Event]) -> None:
        """A piece has come, and means ``events``."""
        self.logprobs += output.logprobs
        self.finish_reason, self.stop_word = output.finish_reason, output.stop_word
        for event in events:
            match event:
                case Text(text):
                    self.text += text
                case Thought(text):
                    self.thought += text
                case CallBegins(_, name):
                    self.calls.append((name, ""))
                case CallArguments(index, piece):
                    name, arguments = self.calls[index]
                    self.calls[index] = (name, arguments + piece)


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates want it: the arguments of calls are objects there, not texts."""
    plain = message.model_dump(exclude_none=True)
    for call in plain.get("tool_calls", []):
        call["function"]["arguments"] = _object(call["function"]["arguments"])
    return plain


def _object(text: str) -> Any:
    """What a call's arguments say; as they are where they are no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, Mapping) else text
