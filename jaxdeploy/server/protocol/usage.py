"""What a reply took."""

from __future__ import annotations

from pydantic import BaseModel


class CachedTokens(BaseModel):
    """Prompt tokens that were found in the cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of the prompt and of all its replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        """From three counts."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )
