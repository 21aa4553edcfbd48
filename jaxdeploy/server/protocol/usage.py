"""What a reply took."""

from __future__ import annotations

from pydantic import BaseModel

from jaxdeploy.messages import NO_SPECULATION, SpeculationCounts


class CachedTokens(BaseModel):
    """Prompt tokens that were found in the cache."""

    cached_tokens: int


class PredictionTokens(BaseModel):
    """Counts of speculative decoding, with OpenAI's names.

    accepted_prediction_tokens: draft tokens that were accepted.
    rejected_prediction_tokens: draft tokens that were not.
    acceptance_rate: share of the draft tokens that were accepted.
    mean_accepted_length: mean tokens of a verification, including the one sampled after the drafts.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    acceptance_rate: float
    mean_accepted_length: float

    @classmethod
    def of(cls, counts: SpeculationCounts) -> PredictionTokens:
        """As a client reads it."""
        return cls(
            accepted_prediction_tokens=counts.accepted,
            rejected_prediction_tokens=counts.drafts - counts.accepted,
            acceptance_rate=round(counts.acceptance_rate, 4),
            mean_accepted_length=round(counts.mean_length, 4),
        )


class Usage(BaseModel):
    """Tokens of the prompt and of all its replies; ``completion_tokens_details`` if there were drafts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictionTokens | None = None

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int, counts: SpeculationCounts = NO_SPECULATION) -> Usage:
        """From what was counted."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
            completion_tokens_details=PredictionTokens.of(counts) if counts.rounds else None,
        )
