"""What a reply took."""

from __future__ import annotations

from pydantic import BaseModel

from jaxdeploy.messages import NO_SPECULATION, SpeculationCounts


class CachedTokens(BaseModel):
    """Prompt tokens that were found in the cache."""

    cached_tokens: int


class PredictionTokens(BaseModel):
    """How speculative decoding went: tokens guessed right and wrong (OpenAI's names), the share of the first.

    ``mean_accepted_length`` is the tokens that a step of verification gave, the one behind the guesses among them.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    acceptance_rate: float
    mean_accepted_length: float

    @classmethod
    def of(cls, guesses: SpeculationCounts) -> PredictionTokens:
        """As a client reads it."""
        return cls(
            accepted_prediction_tokens=guesses.accepted,
            rejected_prediction_tokens=guesses.drafts - guesses.accepted,
            acceptance_rate=round(guesses.acceptance_rate, 4),
            mean_accepted_length=round(guesses.mean_length, 4),
        )


class Usage(BaseModel):
    """Tokens of the prompt and of all its replies; ``completion_tokens_details`` where any were guessed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictionTokens | None = None

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int, guesses: SpeculationCounts = NO_SPECULATION) -> Usage:
        """From what was counted."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
            completion_tokens_details=PredictionTokens.of(guesses) if guesses.rounds else None,
        )
