"""``/v1/responses``: OpenAI's request of items, for a model that writes text and calls functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.response_format import nested_form
from jaxdeploy.server.protocol.chat import MOST_MESSAGES, MOST_TOOLS, ChatRequest
from jaxdeploy.server.protocol.fields import Sampling, Strict, TemplateVariables, refused
from jaxdeploy.server.protocol.response_items import Item, Items, messages_of


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
