"""LMDeploy's own routes: ``/v1/chat/interactive`` as in its version 0.3, ``/generate`` as in its later ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.server.protocol.chat import MOST_MESSAGES, Message
from jaxdeploy.server.protocol.fields import Stop, Stops, TokenIds, Unpacked, as_stops, refused, set_fields


class Named(Unpacked):
    """Who is asked; LMDeploy has the second field alone."""

    model: str = Field("", description="a name of GET /v1/models; none: the model that is served")
    adapter_name: str | None = Field(None, description="the same, for a LoRA adapter")

    @property
    def named(self) -> str:
        """A name of ``/v1/models``, or nothing."""
        return self.adapter_name or self.model


class InteractiveRequest(Named):
    """What is said next in a session; with ``interactive_mode`` the session goes on after the reply."""

    prompt: str | Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    session_id: int = Field(-1, ge=-1, lt=2**63, description="-1: a new one")
    interactive_mode: bool = Field(False, description="keep what was said under session_id for the next request")
    stream: bool = False
    cancel: bool = Field(False, description="end the reply that runs for session_id, and say nothing")
    stop: Stop | Stops | None = None
    request_output_len: int | None = Field(
        None, ge=0, le=2**31 - 1, description="most tokens of the reply; 0: say nothing, and end the session"
    )
    top_p: float = Field(0.8, ge=0, le=1)
    top_k: int = Field(40, ge=0, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    temperature: float = Field(0.8, ge=0, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    min_new_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    image_url: Any = refused("this model reads text only")

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.cancel and self.session_id == -1:
            raise RequestError("cancel=true needs the session_id of the reply that is to end; give it")
        if self.request_output_len == 0 and self.interactive_mode:
            raise RequestError(
                "request_output_len=0 ends a session, interactive_mode goes on with it; give one of them"
            )
        return self

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What is said."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [message.model_dump() for message in self.prompt]

    def generation(self) -> dict[str, Any]:
        """Return the settings of the reply, as fields of ``GenerationConfig``."""
        fields = {
            "do_sample": True,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "temperature": self.temperature,
            "repetition_penalty": self.repetition_penalty,
            "random_seed": self.seed,
            "min_new_tokens": self.min_new_tokens,
            "ignore_eos": self.ignore_eos,
            "stop_words": as_stops(self.stop),
            "max_new_tokens": self.request_output_len or 2**31 - 1,
            "skip_special_tokens": self.skip_special_tokens,
            "spaces_between_special_tokens": self.spaces_between_special_tokens,
        }
        return set_fields(fields)


class InteractiveReply(BaseModel):
    """A reply or, in a stream, its next piece; ``tokens`` of the reply so far."""

    text: str
    tokens: int
    input_tokens: int
    history_tokens: int
    finish_reason: str | None


class GenerateRequest(Named):
    """A text, or token ids, to go on with as they are."""

    prompt: str | None = None
    input_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] | None = None
    session_id: int | None = Field(None, ge=-1, lt=2**63)
    return_logprob: bool = False
    max_tokens: int = Field(128, ge=1, le=2**31 - 1)
    stop: Stop | Stops | None = None
    stop_token_ids: TokenIds | None = None
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    image_data: Any = refused("this model reads text only")
    return_routed_experts: Any = refused("no model here has experts", False)
    repetition_ngram_size: Any = refused("repetition_penalty makes repetitions less likely", 0)
    repetition_ngram_threshold: Any = refused("repetition_penalty makes repetitions less likely", 0)
    media_io_kwargs: Any = refused("this model reads text only")
    mm_processor_kwargs: Any = refused("this model reads text only")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.input_ids is None):
            raise RequestError("prompt or input_ids must be given, and not both; leave one out")
        return self

    def generation(self) -> dict[str, Any]:
        """Return the settings of the reply, as fields of ``GenerationConfig``."""
        fields = {
            "do_sample": True,
            "temperature": self.temperature,
            "repetition_penalty": self.repetition_penalty,
            "ignore_eos": self.ignore_eos,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "stop_words": as_stops(self.stop),
            "stop_token_ids": self.stop_token_ids,
            "max_new_tokens": self.max_tokens,
            "skip_special_tokens": self.skip_special_tokens,
            "spaces_between_special_tokens": self.spaces_between_special_tokens,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "logprobs": 0 if self.return_logprob else None,
        }
        return set_fields(fields)


class Ended(BaseModel):
    """Why a reply ended."""

    type: Literal["stop", "length", "abort", "error"]


class MetaInfo(BaseModel):
    """Counts, and log-probability with token id for every token."""

    prompt_tokens: int
    completion_tokens: int
    finish_reason: Ended | None
    output_token_logprobs: list[tuple[float, int]] | None = None


class GenerateReply(BaseModel):
    """A reply or, in a stream, its next piece; the counts are from its beginning."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
