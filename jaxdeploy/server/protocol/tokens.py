"""Routes about tokens: ``/v1/encode`` as LMDeploy has it, ``/tokenize`` and ``/detokenize`` as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from jaxdeploy.errors import RequestError
from jaxdeploy.server.protocol.chat import Message
from jaxdeploy.server.protocol.fields import Strict, TemplateVariables

Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]


class EncodeRequest(Strict):
    """A text or several."""

    input: str | list[str]
    do_preprocess: bool = Field(False, description="put each text into the chat template, as what a user says")
    add_bos: bool = True


class EncodeReply(BaseModel):
    """Token ids of each text, and how many."""

    input_ids: list[int] | list[list[int]]
    length: int | list[int]


class TokenizeRequest(Strict):
    """A text, or the messages of a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = Field(None, description="as in /v1/chat/completions")
    continue_final_message: bool | None = Field(None, description="as in /v1/chat/completions")
    return_token_strs: bool = False
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt or messages must be given, and not both; leave one out")
        return self


class TokenizeReply(BaseModel):
    """Token ids; ``max_model_len`` is what a prompt and its reply may have together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str = ""
    tokens: Ids


class DetokenizeReply(BaseModel):
    """Their text, special tokens included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client may want to know of the tokenizer."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_tokens: dict[str, str]
    chat_template: str | None
    max_model_len: int
