"""A reply as it arrives, output by output."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxdeploy.messages import NO_SPECULATION, FinishReason, PromptResult, SpeculationCounts, TokenLogprob

if TYPE_CHECKING:
    from jaxdeploy.errors import JaxdeployError
    from jaxdeploy.messages import TextOutput


@dataclass
class Reply:
    """A reply, collected from its outputs by ``add``. Times are seconds of ``time.perf_counter``.

    text: the text so far.
    token_ids: the tokens so far.
    logprobs: their log-probabilities, if the request asked for them.
    num_tokens: number of tokens so far.
    finish_reason: why the reply ended; ``None`` if it has not.
    stop_word: the text that ended the reply, if one did.
    cached_tokens: prompt tokens that were found in the cache.
    prompt: hidden states and log-probabilities of the prompt, if the request asked for them.
    speculation: counts of drafts.
    error: why the request failed, with ``FinishReason.ERROR``.
    started_at: when the request was made.
    first_token_at: when the first token arrived; ``None`` before that.
    updated_at: when the last output arrived.
    keeps_content: whether ``text``, ``token_ids`` and ``logprobs`` are kept. A stream passes them on instead.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_word: str | None = None
    cached_tokens: int = 0
    prompt: PromptResult | None = None
    speculation: SpeculationCounts = NO_SPECULATION
    error: JaxdeployError | None = None
    started_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    updated_at: float = 0.0
    keeps_content: bool = True

    def add(self, output: TextOutput) -> None:
        """Append an output."""
        self.updated_at = time.perf_counter()
        if output.token_ids and self.first_token_at is None:
            self.first_token_at = self.updated_at
        self.num_tokens += len(output.token_ids)
        self.finish_reason = output.finish_reason
        self.stop_word = output.stop_word
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        self.speculation = output.speculation
        self.error = output.error
        if self.keeps_content:
            self._append(output)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the request to the first token; ``None`` without a token."""
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds for each token after the first; ``None`` for fewer than two tokens."""
        if self.first_token_at is None or self.num_tokens < 2:
            return None
        return (self.updated_at - self.first_token_at) / (self.num_tokens - 1)

    def _append(self, output: TextOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt = output.prompt or self.prompt
