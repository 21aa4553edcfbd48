"""``/v1/embeddings``: texts or token ids as vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from jaxdeploy.server.protocol.completions import Prompt, prompts_of
from jaxdeploy.server.protocol.fields import Strict


class EmbeddingsRequest(Strict):
    """A text, several, the token ids of one, or of several."""

    input: Prompt
    model: str = Field("", description="a name of GET /v1/models; none: the model that is served")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32 numbers; default float"
    )
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1, description="first numbers of a vector that are kept")
    user: str | None = Field(None, max_length=512, description="shares of the engine are fair between users")

    pooling: Literal["last", "mean"] = Field("last", description="hidden state of the last token, or the mean of all")
    normalize: bool = Field(True, description="vectors have length 1")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="the lowest comes first")

    @property
    def prompts(self) -> list[str | list[int]]:
        """What is to be embedded, one by one."""
        return prompts_of(self.input)


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    """All vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
