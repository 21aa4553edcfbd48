"""What has come of a reply, and its log-probabilities in words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from jaxdeploy.engine.front.generator import TextOutput
from jaxdeploy.messages import FinishReason, PromptReading, SpeculationCounts, TokenLogprob
from jaxdeploy.server.protocol.chat import ChoiceLogprobs, ChosenLogprob, LogprobOf
from jaxdeploy.server.protocol.usage import Usage
from jaxdeploy.tokenizer import Tokenizer


@dataclass
class Collected:
    """A reply as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    prompt: PromptReading | None = None

    def add(self, output: TextOutput) -> None:
        """Append a piece."""
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.cached_tokens = output.cached_tokens
        self.prompt = output.prompt or self.prompt


@dataclass
class Counts:
    """Tokens of all replies so far, ``n`` of them to each prompt."""

    prompt: int
    n: int = 1
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)
    speculation: dict[int, SpeculationCounts] = field(default_factory=dict)

    def add(self, index: int, output: TextOutput) -> None:
        """Count a piece of reply ``index``."""
        self.completion += len(output.token_ids)
        self.speculation[index] = output.speculation
        self.cached[index // self.n] = max(self.cached.get(index // self.n, 0), output.cached_tokens)

    @property
    def usage(self) -> Usage:
        """As a client reads it."""
        guesses = SpeculationCounts(*map(sum, zip(*self.speculation.values(), strict=True)))
        return Usage.of(self.prompt, self.completion, sum(self.cached.values()), guesses)


async def collect(pieces: AsyncIterator[tuple[int, TextOutput]], count: int, counts: Counts) -> list[Collected]:
    """All ``count`` replies in whole."""
    replies = [Collected() for _ in range(count)]
    async for index, output in pieces:
        replies[index].add(output)
        counts.add(index, output)
    return replies


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as it stands in lists of tokens: special ones with their names."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TokenLogprob]) -> ChoiceLogprobs:
    """In the form of ``/v1/chat/completions``."""

    def one(token_id: int, logprob: float) -> dict[str, object]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return ChoiceLogprobs(
        content=[
            ChosenLogprob.model_validate(
                {
                    **one(token.token_id, token.logprob),
                    "top_logprobs": [LogprobOf.model_validate(one(*top)) for top in token.top],
                }
            )
            for token in tokens
        ]
    )
