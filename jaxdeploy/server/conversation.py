"""From a conversation to its replies: what the chat routes of all APIs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdeploy.chat_template.conversation import text_of
from jaxdeploy.errors import RequestError
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import Request, TextOutput
from jaxdeploy.server.call_grammar import call_grammar
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.parsers.events import CallArguments, CallBegins, Event, Text, Thought
from jaxdeploy.server.protocol.chat import ChatRequest, Message
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.reply_parser import ReplyParser, parsers_for
from jaxdeploy.server.service import ModelService


async def chat_requests(service: ModelService, asked: ChatRequest, context: RequestContext) -> list[Request]:
    """Make the requests for the replies to a conversation. Raises ``RequestError``."""
    variables = {**(asked.chat_template_kwargs or {}), **asked.ending}
    calls = None
    if asked.may_call:
        if service.tool_form is None:
            raise RequestError("tools: the model has no known form of calls; start the server with --tool-call-parser")
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
        if asked.must_call:
            several = asked.parallel_tool_calls is not False and asked.tool_choice == "required"
            calls = call_grammar(service.tool_form, asked.functions_to_call, service.tokenizer, several=several)
    ids = await service.encoder.chat_ids([message.model_dump() for message in asked.messages], **variables)
    return await service.requests(ids, asked.generation(calls), context, chat=True)


@dataclass(kw_only=True)
class ParsedReply(Reply):
    """A reply whose ``text`` is without thoughts and calls.

    parser: separates them.
    thought: the thoughts so far.
    calls: names and arguments (JSON) of the calls so far.
    events: the additions of the last output.
    """

    parser: ReplyParser
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, output: TextOutput) -> None:
        """Append an output, and set ``events``."""
        self.events = self.parser.push(output.text, ends=output.finish_reason is not None)
        super().add(output)

    def _append(self, output: TextOutput) -> None:
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        for event in self.events:
            self._append_event(event)

    def _append_event(self, event: Event) -> None:
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


def chat_replies(
    service: ModelService, asked: ChatRequest, requests: Sequence[Request], context: RequestContext, *, stream: bool
) -> Replies[ParsedReply]:
    """Return the replies to a conversation, which have not begun. Those of a stream do not keep their content."""
    thinking = _thinks(service, asked.messages[-1], requests[0])
    tools = service.tool_form if asked.may_call else None

    def make_reply() -> ParsedReply:
        parsers = parsers_for(tools, service.reasoning_form, thinking=thinking)
        parser = ReplyParser(parsers, one_call=asked.parallel_tool_calls is False)
        return ParsedReply(parser=parser, keeps_content=not stream)

    return Replies(service, requests, context, make_reply, len(requests))


def with_reply(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return a conversation with a reply at its end. The reply may continue the last message."""
    *before, last = messages
    if last["role"] != "assistant" or last.get("tool_calls"):
        return [*messages, {"role": "assistant", "content": text}]
    return [*before, {**last, "content": text_of(last) + text}]


def _thinks(service: ModelService, last: Message, request: Request) -> bool:
    """Return whether a reply begins inside a thought: the prompt ends with its mark, or with a part of it."""
    form = service.reasoning_form
    if form is None:
        return False
    said = text_of(last.model_dump()) if last.role == "assistant" else ""
    opened = said.rfind(form.BEGIN) > said.rfind(form.END) or (last.reasoning_content is not None and not said)
    return opened or service.encoder.ends_with(request.prompt_token_ids, form.BEGIN)
