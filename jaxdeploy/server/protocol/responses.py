"""``/v1/responses``: OpenAI's request of items, for a model that writes text and calls functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.response_format import nested_form
from jaxdeploy.server.protocol.chat import MOST_MESSAGES, MOST_TOOLS, ChatRequest
from jaxdeploy.server.protocol.fields import Arguments, Sampling, Strict, TemplateVariables, echoed, refused

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class TextPart(Strict):
    """Text that was said by either side."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Any = echoed("notes on the text")
    logprobs: Any = echoed("log-probabilities of the text")
    parsed: Any = echoed("text, as OpenAI's client parsed it")
    prompt_cache_breakpoint: Any = Field(None, description="of no need: prompts that begin alike always share")


class RefusalPart(Strict):
    """What the model said in place of a reply."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The same as text."""
        return self.refusal


class ReasoningPart(Strict):
    """A thought, or what it comes to."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _kind(item: Any) -> str | None:
    """The tag of an item, which is no identifier, for it has no place in the path to a field that is wrong."""
    if not isinstance(item, dict):
        return None
    return f"type={item.get('type') or 'message'}"


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class MessageItem(Strict):
    """Something that was said."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: ItemStatus | None = None
    phase: Any = refused("leave it out")


class CallItem(Strict):
    """A call that the model made in an earlier reply."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    parsed_arguments: Any = echoed("arguments, as OpenAI's client parsed them")
    id: str | None = None
    status: ItemStatus | None = None
    namespace: Any = refused("leave it out")
    caller: Any = refused("the model calls by itself", {"type": "direct"})


class CallOutputItem(Strict):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: ItemStatus | None = None
    name: str | None = None
    namespace: Any = refused("leave it out")
    caller: Any = refused("the model calls by itself", {"type": "direct"})


class ReasoningItem(Strict):
    """What the model said to itself in an earlier reply."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningPart] = Field([])
    content: list[ReasoningPart] | None = None
    status: ItemStatus | None = None
    encrypted_content: Any = refused("this server cannot read it; send content")


Item = Annotated[
    Annotated[MessageItem, Tag("type=message")]
    | Annotated[CallItem, Tag("type=function_call")]
    | Annotated[CallOutputItem, Tag("type=function_call_output")]
    | Annotated[ReasoningItem, Tag("type=reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="It is no message, function_call, function_call_output or reasoning; leave it out",
    ),
]
Items = Annotated[
    list[Item],
    Field(min_length=1, max_length=MOST_MESSAGES),
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]


class FunctionTool(Strict):
    """A function that the model may call; ``parameters`` is a JSON Schema."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w./:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Any = refused("the model calls by itself", ["direct"])
    defer_loading: Any = refused("all tools are shown at once", False)
    output_schema: Any = refused("describe it in description")

    def echo(self) -> dict[str, Any]:
        """As it comes back with the response."""
        return self.model_dump(include={"type", "name", "description", "parameters", "strict"})


class NamedFunction(Strict):
    """A function by its name."""

    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """Some of the tools; the model is shown no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MOST_TOOLS)]


Choice = Annotated[NamedFunction | AllowedTools, Field(discriminator="type")]


class TextConfig(Strict):
    """What form the text of the reply is to have."""

    format: dict[str, Any] | None = Field(
        None, description="text, json_object, json_schema, regex_schema, choice or grammar"
    )
    verbosity: Any = refused("say it in a message")

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        form = self.format or {}
        if form.get("type") == "json_schema" and not isinstance(form.get("schema"), dict):
            raise RequestError("text.format.schema is missing; give a JSON Schema object")
        return self

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The form as chat requests have it."""
        return None if self.format is None else nested_form(self.format)


class Reasoning(Strict):
    """How the model is to think, which its chat template settles."""

    effort: Any = refused("give what the chat template knows in chat_template_kwargs")
    summary: Any = refused("thoughts come in whole, as content of reasoning items")
    generate_summary: Any = refused("thoughts come in whole, as content of reasoning items")
    mode: Any = refused("there is one", "standard")
    context: Any = refused("the chat template decides which thoughts are read again", "auto")


class ResponsesStreamOptions(Strict):
    """What a stream brings beside the reply."""

    include_obfuscation: Any = refused("leave it out", False)


class ResponsesRequest(Sampling):
    """Items that the model is to go on with."""

    input: Items
    instructions: str | None = Field(None, description="a system message before all others; not carried over")
    previous_response_id: str | None = Field(None, max_length=128, description="a stored response to go on with")
    store: bool | None = Field(True, description="false: the response cannot be asked for again")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = Field(
        None, description="default auto; required, or a function's name, has calls made by a grammar"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="comes back with the response")
    chat_template_kwargs: TemplateVariables | None = None
    safety_identifier: str | None = Field(None, max_length=512, description="newer name of user")
    prompt_cache_key: str | None = Field(None, description="of no need: prompts that begin alike always share")

    n: Any = refused("a response is one reply", 1)
    access_programs: Any = refused("leave it out")
    background: Any = refused("stream the reply", False)
    background_options: Any = refused("stream the reply")
    context_management: Any = refused("leave items out of input", [])
    conversation: Any = refused("previous_response_id goes on with a response")
    image: Any = refused("this model reads text only")
    include: Any = refused("a response has all there is", [])
    max_tool_calls: Any = refused("this server calls no tools by itself")
    moderation: Any = refused("leave it out")
    prompt: Any = refused("send its text as instructions or input")
    prompt_cache_options: Any = refused("prompts that begin alike always share")
    prompt_cache_retention: Any = refused("the cache is in memory", "in_memory")
    service_tier: Any = refused("there is one", "auto", "default")
    top_logprobs: Any = refused("/v1/chat/completions has them", 0)
    truncation: Any = refused("leave items out of input", "disabled")

    def chat_request(self, before: Sequence[Item]) -> ChatRequest:
        """The same, after the items of earlier responses, in the form of a chat. Raises ``RequestError``."""
        messages = messages_of([*before, *self.input])
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        if len(messages) > MOST_MESSAGES:
            raise RequestError(f"input makes {len(messages)} messages, {MOST_MESSAGES} at most; begin anew")
        fields = {name: getattr(self, name) for name in Sampling.model_fields}
        fields |= {"messages": messages, **self._tools()}
        return ChatRequest(
            **fields,
            max_completion_tokens=self.max_output_tokens,
            response_format=self.text.response_format if self.text else None,
            chat_template_kwargs=self.chat_template_kwargs,
            safety_identifier=self.safety_identifier,
        )

    def _tools(self) -> dict[str, Any]:
        tools, choice = self.tools or [], self.tool_choice
        chosen: Any = choice
        if isinstance(choice, NamedFunction):
            chosen = {"type": "function", "function": {"name": choice.name}}
        if isinstance(choice, AllowedTools):
            tools, chosen = _allowed(tools, choice), choice.mode
        return {
            "tools": [_chat_tool(tool) for tool in tools] or None,
            "tool_choice": chosen,
            "parallel_tool_calls": self.parallel_tool_calls,
        }


class RetrieveQuery(Strict):
    """How a stored response is asked for."""

    stream: Any = refused("only whole responses are kept", "false")
    starting_after: Any = refused("only whole responses are kept")
    include: Any = refused("a response has all there is")
    include_obfuscation: Any = refused("leave it out", "false")


def _allowed(tools: list[FunctionTool], choice: AllowedTools) -> list[FunctionTool]:
    known = {tool.name: tool for tool in tools}
    for tool in choice.tools:
        if tool.name not in known:
            raise RequestError(f"tool_choice.tools: {tool.name!r:.60} names no function of tools; add it there")
    return [known[tool.name] for tool in choice.tools]


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.echo()
    return {"type": function.pop("type"), "function": function}


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Return the messages of a chat. The thoughts, text and calls of one reply are one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                _reply(messages, "content", "tool_calls")["content"] = _text(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
            case ReasoningItem():
                reply = _reply(messages, "content", "tool_calls")
                reply["reasoning_content"] = reply.get("reasoning_content", "") + _text(item.content or item.summary)
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _reply(messages).setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                name = {"name": item.name} if item.name else {}
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output), **name})
    for message in messages:
        if "tool_calls" not in message:
            message.setdefault("content", "")
    return messages


def _reply(messages: list[dict[str, Any]], *ending: str) -> dict[str, Any]:
    """The model's message at the end, which has none of the fields ``ending``; a new one if there is none."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in ending):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(parts: Iterable[TextPart | RefusalPart | ReasoningPart]) -> str:
    return "".join(part.text for part in parts)
