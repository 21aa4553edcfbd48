"""From a conversation to its replies: what the chat routes of all APIs share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from jaxdeploy.chat_template.conversation import text_of
from jaxdeploy.engine.front.generator import TextOutput
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
    variables = {**(asked.chat_template_kwargs or {}), **asked.ending}
    calls = None
    if asked.may_call:
        if served.tool_form is None:
            raise RequestError("tools: the model has no known form of calls; start the server with --tool-call-parser")
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
        if asked.must_call:
            several = asked.parallel_tool_calls is not False and asked.tool_choice == "required"
            calls = call_grammar(served.tool_form, asked.functions_to_call, served.tokenizer, several=several)
    ids = await served.chat_ids([message.model_dump() for message in asked.messages], **variables)
    return await served.resolved(ids, asked.generation(calls), chat=True)


class Replies:
    """The replies to one request, read as they come. ``counts`` are tokens so far."""

    def __init__(self, served: Served, asked: ChatRequest, prompt: Prompt, origin: Origin) -> None:
        self.served, self.asked, self.origin = served, asked, origin
        self.counts = Counts(len(prompt.ids), prompt.how.n)
        self._prompt = prompt
        thinking = _thinks(served, asked.messages[-1], prompt)
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


def with_reply(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """A conversation with a reply at its end, which may be the rest of its last message."""
    *before, last = messages
    if last["role"] != "assistant" or last.get("tool_calls"):
        return [*messages, {"role": "assistant", "content": text}]
    return [*before, {**last, "content": text_of(last) + text}]


def _thinks(served: Served, last: Message, prompt: Prompt) -> bool:
    """Whether a reply begins inside a thought: the prompt ends with its mark, or with a part of it."""
    form = served.reasoning_form
    if form is None:
        return False
    said = text_of(last.model_dump()) if last.role == "assistant" else ""
    opened = said.rfind(form.BEGIN) > said.rfind(form.END) or (last.reasoning_content is not None and not said)
    return opened or served.ends_with(prompt.ids, form.BEGIN)
