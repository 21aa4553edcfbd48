"""``/v1/completions``: texts or token ids that the model goes on with, as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.server.protocol.fields import Sampling, StreamOptions, check_stream_options, refused
from jaxdeploy.server.protocol.usage import Usage

MOST_PROMPTS = 1024
OPENAI_MAX_TOKENS = 16
MOST_COMPLETION_LOGPROBS = 5

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
ManyIds = Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
Logprobs = Annotated[
    Annotated[int, Field(ge=0, le=MOST_COMPLETION_LOGPROBS)] | None,
    BeforeValidator(lambda given: None if given is False else given, json_schema_input_type=int | None),
]
"""Likeliest tokens in place of each; false, as chats have it, asks for none."""
Prompt: TypeAlias = str | Ids | Texts | ManyIds


def prompts_of(given: Prompt) -> list[str | list[int]]:
    """One by one."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


class CompletionRequest(Sampling):
    """Prompts to go on with: a text, several, the token ids of one, or of several."""

    prompt: Prompt
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="LMDeploy's; before max_tokens")
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="default 16; 0 needs echo")
    logprobs: Logprobs = None
    echo: bool | None = None
    response_format: dict[str, Any] | None = Field(None, description="form of the reply, as for a chat")
    stream_options: StreamOptions | None = None
    session_id: int | None = Field(None, ge=-1, lt=2**63, description="LMDeploy's; without effect, as there")

    suffix: Any = refused("put the whole prompt into the model's own infilling form", "")
    best_of: Any = refused("ask for n and choose", 1)

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens=0 gives nothing; ask for a token, or for echo=true")
        check_stream_options(self)
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        return prompts_of(self.prompt)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are wanted."""
        return bool(self.echo) and self.logprobs is not None

    def generation(self) -> dict[str, Any]:
        """Return the settings of the replies, as fields of ``GenerationConfig``."""
        max_tokens = OPENAI_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.generation_fields(
            max_new_tokens=max(max_tokens, 1),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            response_format=self.response_format,
        )


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the tokens of a reply, behind those of the prompt where it is echoed.

    The first token of a prompt has none. ``text_offset`` counts characters from the start.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One reply, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionReply(BaseModel):
    """All replies, or in a stream a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
