"""What several APIs' requests have in common: the sampling fields, and how a request's fields become a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from jaxdeploy.config.generation import MAX_ALTERNATIVES
from jaxdeploy.engine.checks import MAX_BIASES
from jaxdeploy.errors import RequestError
from jaxdeploy.server.protocol.bounded import Bounded

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
RESERVED = frozenset({"messages", "tokenizer", "tools", "add_generation_prompt", "continue_final_message"})
"""Variables of a chat template that come from elsewhere."""

NOTHINGS: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""

_INT64 = 2**63

Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Word = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1024)]


@dataclass(frozen=True)
class _Refused:
    advice: str
    fine: tuple[Any, ...]


def refused(advice: str, *fine: Any) -> Any:
    """A documented field without a feature: null, empty values and those in ``fine`` pass, all others raise."""
    field: Any = Field(None, description=f"not there: {advice}")
    field.metadata.append(_Refused(advice, fine))
    return field


def _not_reserved(variables: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(RESERVED.intersection(variables))
    if taken:
        raise RequestError(f"chat_template_kwargs.{taken[0]} has a field of its own; give it there")
    return variables


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_not_reserved)]
"""More variables for the chat template."""


def echoed(description: str) -> Any:
    """A field that clients copy from a reply: it is accepted, and neither the model nor its template reads it."""
    return Field(None, exclude=True, description=description)


def as_json(given: Any) -> Any:
    """Arguments of a call as JSON; some clients send the object itself."""
    return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given


Arguments = Annotated[str, BeforeValidator(as_json, json_schema_input_type=str | dict[str, Any])]
"""Arguments of a call, as JSON."""


class Strict(Bounded):
    """A part of a request: a field that is unknown, or whose feature is not there, is an error and never ignored.

    Clients send their objects back with null and empty fields. An unknown field with such a value is dropped, and null
    in a field that has a default is the default.
    """

    model_config = ConfigDict(extra="forbid")
    _refused: ClassVar[dict[str, _Refused]] = {}
    """Name → refusal of the fields without a feature."""
    _defaulted: ClassVar[frozenset[str]] = frozenset()
    """Fields in which null is the default."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        refusals = {name: _refusal_of(field) for name, field in cls.model_fields.items()}
        cls._refused = {name: refusal for name, refusal in refusals.items() if refusal is not None}
        cls._defaulted = frozenset(
            name for name, field in cls.model_fields.items() if field.default is not None and not field.is_required()
        )

    @model_validator(mode="before")
    @classmethod
    def _drop_nothings(cls, given: Any) -> Any:
        """Drop values that say nothing from fields that are unknown, refused or defaulted."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            is_read = name in cls.model_fields and name not in cls._refused
            if (value is not None or name not in cls._defaulted) if is_read else value not in NOTHINGS:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        for name, refusal in self._refused.items():
            value = getattr(self, name)
            if value is not None and value not in NOTHINGS and value not in refusal.fine:
                raise RequestError(f"{name}={value!r:.60} is not there; {refusal.advice}")
        return self


def _refusal_of(field: FieldInfo) -> _Refused | None:
    return next((about for about in field.metadata if isinstance(about, _Refused)), None)


SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "n"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "bad_words", "logit_bias"),
    *("ignore_eos", "min_new_tokens", "stop_token_ids", "include_stop_str_in_output"),
    *("skip_special_tokens", "spaces_between_special_tokens", "num_speculative_tokens"),
)
"""Fields of a request that ``GenerationConfig`` has by the same names."""

_SAME_FIELDS = attrgetter(*SAME_NAMES)
"""Returns their values."""


Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[int, Bias], Field(max_length=MAX_BIASES)]


class Unpacked(Strict):
    """A request of LMDeploy's client, which puts the fields that it has no argument for into ``kwargs``."""

    @model_validator(mode="before")
    @classmethod
    def _unpack(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("kwargs"), dict):
            return given
        named = {name: value for name, value in given.items() if name != "kwargs"}
        return {**given["kwargs"], **named}


class Sampling(Unpacked):
    """Fields of a request that say how tokens are chosen; OpenAI's, then those that LMDeploy adds."""

    model: str = Field("", description="a name of GET /v1/models; none: the model that is served")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_ALTERNATIVES)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop | Stops | None = None
    stream: bool | None = False
    user: str | None = Field(None, max_length=512, description="shares of the engine are fair between users")

    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0 keeps all tokens, 1 is greedy")
    min_p: float | None = Field(None, ge=0, le=1)
    logit_bias: LogitBias | None = Field(None, description="token id → what is added to its logit")
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    min_new_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    stop_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Word], Field(max_length=MAX_STOPS)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    num_speculative_tokens: int | None = Field(
        None, ge=0, le=2**31 - 1, description="draft tokens per step, at most the number of the server; 0: none"
    )
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="the lowest comes first")
    repetition_ngram_size: Any = refused("repetition_penalty makes repetitions less likely", 0)
    repetition_ngram_threshold: Any = refused("repetition_penalty makes repetitions less likely", 0)

    @property
    def stop_words(self) -> list[str]:
        """``stop`` as a list."""
        return as_stops(self.stop)

    def generation_fields(self, **more: Any) -> dict[str, Any]:
        """Return the fields of ``GenerationConfig`` that are set, and ``more``.

        The values were checked when the request was read. As OpenAI has it, a reply is drawn at random by default.
        """
        fields = dict(zip(SAME_NAMES, _SAME_FIELDS(self), strict=True))
        stops = as_stops(self.stop)
        fields.update(more, do_sample=True, random_seed=self.seed, stop_words=stops)
        return {name: value for name, value in fields.items() if value is not None}


def set_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not ``None``."""
    return {name: value for name, value in fields.items() if value is not None}


def as_stops(stop: str | list[str] | None) -> list[str]:
    """The words of a ``stop`` field; an empty text is none."""
    if not stop:
        return []
    words = [stop] if isinstance(stop, str) else stop
    return [word for word in words if word]


class StreamOptions(Strict):
    """What a stream brings beside the reply."""

    include_usage: bool = Field(False, description="end with a chunk that has the usage, and no choice")
    continuous_usage_stats: Any = refused("include_usage has the usage at the end", False)
    include_obfuscation: Any = refused("leave it out", False)


def check_stream_options(asked: Any) -> None:
    """Raise ``RequestError`` if a request for a whole reply has stream options that ask for something."""
    if asked.stream_options is not None and asked.stream_options.include_usage and not asked.stream:
        raise RequestError("stream_options are for streams only; add stream=true")
