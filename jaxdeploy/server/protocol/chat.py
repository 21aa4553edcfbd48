"""``/v1/chat/completions``: OpenAI's request and reply, with LMDeploy's additions."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from jaxdeploy.engine.checks import MAX_LOGPROBS
from jaxdeploy.errors import RequestError
from jaxdeploy.server.protocol.fields import (
    Arguments,
    Sampling,
    StreamOptions,
    Strict,
    TemplateVariables,
    check_stream_options,
    echoed,
    refused,
)
from jaxdeploy.server.protocol.usage import Usage

MOST_MESSAGES = 4096
MOST_TOOLS = 1024


class TextPart(Strict):
    """Text, in the form that has a type."""

    type: Literal["text"]
    text: str
    annotations: Any = echoed("notes on the text")
    cache_control: Any = echoed("of no need: prompts that begin alike share their cache")


class RefusalPart(Strict):
    """A refusal, where the model gave one in place of text."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Strict):
    """Name and arguments (JSON) of a call that the model made."""

    name: str
    arguments: Arguments
    parsed_arguments: Any = echoed("arguments, as OpenAI's client parsed them")


class ToolCall(Strict):
    """A call that the model made in an earlier reply."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Any = echoed("place of the call in a stream")


class FunctionTool(Strict):
    """A function that the model may call; ``parameters`` is a JSON Schema."""

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w./:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """Something that the model may call."""

    type: Literal["function"]
    function: FunctionTool


class FunctionName(Strict):
    """A function by its name."""

    name: str


class NamedChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedFunctions(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedChoice(Strict):
    """OpenAI's form of a choice among some of the tools. The model is shown no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


ToolChoice = Annotated[NamedChoice | AllowedChoice, Field(discriminator="type")]


class Message(Strict):
    """Something that was said."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = Field(None, exclude=True, description="read as content where there is none")
    reasoning: str | None = Field(None, exclude=True, description="vLLM's name of reasoning_content")
    annotations: Any = echoed("notes on the content")
    parsed: Any = echoed("content, as OpenAI's client parsed it")
    audio: Any = refused("this model reads text only")
    function_call: Any = refused("send tool_calls")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if isinstance(self.content, list):
            self.content = [_as_text(part) for part in self.content]
        if self.content is None and self.refusal:
            self.content = self.refusal
        if self.reasoning_content is None and self.reasoning:
            self.reasoning_content = self.reasoning
        if self.content is None and self.role == "assistant" and self.reasoning_content and not self.tool_calls:
            self.content = ""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise RequestError(f"content=null says nothing in a message of role={self.role!r}; give it a text")
        return self


def _as_text(part: TextPart | RefusalPart) -> TextPart:
    return part if isinstance(part, TextPart) else TextPart(type="text", text=part.refusal)


def as_messages(given: Any) -> Any:
    """A text as a conversation in which the user says it, as LMDeploy's client sends one."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MOST_MESSAGES),
    BeforeValidator(as_messages, json_schema_input_type=str | list[Message]),
]


class ChatRequest(Sampling):
    """A conversation that the model is to go on with."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = Field(
        None, description="form of the reply: text, json_object, json_schema, regex_schema, choice or grammar"
    )
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None, description="default auto; required, or a function's name, has calls made by a grammar"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool | None = Field(None, description="begin a new reply; default: unless one comes last")
    continue_final_message: bool | None = Field(None, description="go on with the last message; default: if a reply")
    session_id: int | None = Field(None, ge=-1, lt=2**63, description="a conversation whose cache is kept; -1: none")

    safety_identifier: str | None = Field(None, max_length=512, description="newer name of user")
    prompt_cache_key: str | None = Field(None, description="of no need: prompts that begin alike always share")
    metadata: dict[str, str] | None = Field(None, description="belongs to stored replies; none are stored")
    functions: Any = refused("leave them out", [])
    function_call: Any = refused("leave it out", "none", "auto")
    store: Any = refused("replies are not kept", False)
    service_tier: Any = refused("there is one", "auto", "default")
    modalities: Any = refused("replies are texts", ["text"])
    audio: Any = refused("replies are texts")
    prediction: Any = refused("leave it out")
    web_search_options: Any = refused("leave them out")
    reasoning_effort: Any = refused("give what the chat template knows in chat_template_kwargs")
    verbosity: Any = refused("say it in a message")
    do_preprocess: Any = refused("/v1/completions takes a text as it is", True)
    enable_thinking: bool | None = Field(None, description="the same in chat_template_kwargs, which LMDeploy prefers")
    return_token_ids: Any = refused("/generate has them", False)
    return_logprob: Any = refused("logprobs has them", False)
    return_routed_experts: Any = refused("no model here has experts", False)
    input_ids: Any = refused("/generate takes token ids")
    image_data: Any = refused("this model reads text only")
    media_io_kwargs: Any = refused("this model reads text only")
    mm_processor_kwargs: Any = refused("this model reads text only")

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs={self.top_logprobs} needs logprobs=true; add it")
        if self.stream_options is not None:
            check_stream_options(self)
        if self.enable_thinking is not None:
            self.chat_template_kwargs = {"enable_thinking": self.enable_thinking, **(self.chat_template_kwargs or {})}
        if isinstance(self.tool_choice, AllowedChoice):
            self._allow(self.tool_choice.allowed_tools)
        if self.must_call:
            self._check_call()
        return self

    def _check_call(self) -> None:
        """Raise ``RequestError`` if the call that must be made cannot be."""
        if not self.functions_to_call:
            raise RequestError(f"tool_choice={self.tool_choice!r} names no function of tools; add it there")
        if self.response_format not in (None, {}, {"type": "text"}):
            raise RequestError("tool_choice has a call made, response_format another text; leave one of them out")

    def _allow(self, allowed: AllowedFunctions) -> None:
        """Keep the allowed tools, in the order of the choice. Raises ``RequestError`` for a name that no tool has."""
        known = {tool.function.name: tool for tool in self.tools or []}
        names = [tool.function.name for tool in allowed.tools]
        for name in names:
            if name not in known:
                raise RequestError(f"tool_choice.allowed_tools: {name!r:.60} names no function of tools; add it there")
        self.tools = [known[name] for name in names]
        self.tool_choice = allowed.mode

    @property
    def ending(self) -> dict[str, bool | None]:
        """How the prompt ends."""
        return {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }

    @cached_property
    def may_call(self) -> bool:
        """Whether calls are looked for in the reply."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """Whether the reply must be calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)

    @property
    def functions_to_call(self) -> dict[str, Any]:
        """Name → JSON Schema of the functions that may be called."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
        functions = [tool.function for tool in self.tools or []]
        return {function.name: function.parameters for function in functions if named in (None, function.name)}

    @property
    def tenant(self) -> str:
        """Whose request it is, as far as it says."""
        return self.safety_identifier or self.user or ""

    def generation(self, calls: str | None) -> dict[str, Any]:
        """Return the settings of the reply, as fields of ``GenerationConfig``.

        Without a limit the reply may be as long as there is room. It follows the grammar ``calls``, if any. Where calls
        may be made, special tokens are shown: some forms of calls contain them.
        """
        form = self.response_format
        if calls is not None:
            form = {"type": "grammar", "grammar": calls, "tools": self.functions_to_call}
        fields = self.generation_fields(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or 2**31 - 1,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            response_format=form,
        )
        return {**fields, "skip_special_tokens": False} if self.may_call else fields


class LogprobOf(BaseModel):
    """A token, its natural log-probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(LogprobOf):
    """A token of the reply, and the likeliest ones in its place."""

    top_logprobs: list[LogprobOf]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of the tokens of a reply."""

    content: list[ChosenLogprob]
    refusal: None = None


class Reply(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    """One of the alternatives."""

    index: int
    message: Reply
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str


class ChatReply(BaseModel):
    """The whole reply."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class CallDelta(BaseModel):
    """What a chunk adds to a call: first its name, then pieces of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: dict[str, str]


class Delta(BaseModel):
    """What a chunk adds to a reply."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    """What a chunk adds to one of the alternatives."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """A piece of a streamed reply."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
