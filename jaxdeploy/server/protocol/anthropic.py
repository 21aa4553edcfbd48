"""``/v1/messages``: Anthropic's request and reply, for a model that reads and writes text and calls tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, Field, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.response_format import nested_form
from jaxdeploy.server.protocol.chat import MAX_MESSAGES, MAX_TOOLS, ChatRequest
from jaxdeploy.server.protocol.fields import Stops, Strict, TemplateVariables, echoed, refused


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: Any = None
    citations: Any = refused("leave them out")
    parsed_output: Any = echoed("text, as Anthropic's client parsed it")


class ThinkingBlock(Strict):
    """What the model said to itself in an earlier reply."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    """A call that the model made in an earlier reply."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = refused("the model calls by itself", {"type": "direct"})


class ToolResultBlock(Strict):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool | None = None
    cache_control: Any = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Said(Strict):
    """A message."""

    role: Literal["user", "assistant"]
    content: str | list[Block]

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role == "user" and self.content == []:
            raise RequestError("content=[] says nothing in a message of role='user'; give it a block of text")
        return self


class AnthropicTool(Strict):
    """Something that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w./:-]+$")]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: Any = None


class ToolChoice(Strict):
    """Which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Metadata(Strict):
    """Who asks."""

    user_id: str | None = Field(None, max_length=512)


class OutputConfig(Strict):
    """What form the reply is to have."""

    format: dict[str, Any] | None = Field(None, description='{"type": "json_schema", "schema": {...}}')
    effort: Any = refused("the model thinks as its chat template has it")


class CountRequest(Strict):
    """A conversation whose tokens are to be counted."""

    model: str
    messages: Annotated[list[Said], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    cache_control: Any = Field(None, description="of no need: prompts that begin alike always share")
    thinking: Any = refused("the model thinks as its chat template has it", {"type": "disabled"})
    chat_template_kwargs: TemplateVariables | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The conversation in OpenAI's form."""
        messages = [message for said in self.messages for message in _messages(said)]
        if self.system:
            messages.insert(0, {"role": "system", "content": _text(self.system)})
        choice = self.tool_choice or ToolChoice(type="auto")
        fields: dict[str, Any] = {"messages": messages, "chat_template_kwargs": self.chat_template_kwargs}
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
            fields["tool_choice"] = _choice(choice)
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return fields


class MessagesRequest(CountRequest):
    """A conversation that the model is to go on with."""

    max_tokens: int = Field(ge=1, le=2**31 - 1)
    stop_sequences: Stops | None = None
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    output_config: OutputConfig | None = None
    service_tier: Any = refused("there is one", "auto", "standard_only")

    def chat_request(self) -> ChatRequest:
        """The same in OpenAI's form. Raises ``RequestError``."""
        return ChatRequest(
            **self.chat_fields(),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            user=self.metadata.user_id if self.metadata else None,
            response_format=self._form(),
        )

    def _form(self) -> dict[str, Any] | None:
        form = self.output_config.format if self.output_config else None
        return None if form is None else nested_form(form)


StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicUsage(BaseModel):
    """Tokens; those of the prompt that were in the cache are counted apart, as Anthropic does."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class MessagesReply(BaseModel):
    """The whole reply; ``content`` has blocks of text, thinking and tool_use."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(BaseModel):
    """Tokens of the conversation."""

    input_tokens: int


def _messages(said: Said) -> Iterator[dict[str, Any]]:
    """One message of Anthropic's is one or several of OpenAI's: results of calls stand alone there."""
    if isinstance(said.content, str):
        yield {"role": said.role, "content": said.content}
        return
    texts, thoughts, calls = [], [], []
    for block in said.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                text = ("Error: " if block.is_error else "") + _text(block.content)
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
    message: dict[str, Any] = {"role": said.role}
    if texts or (said.role == "assistant" and not calls):
        message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if len(message) > 1:
        yield message


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name is missing; name the tool")
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
