"""From the arrays that a step returns to ``StepOutput``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdeploy.engine.device.sampler import Sampled
from jaxdeploy.engine.failure import failure
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import FinishReason, PromptResult, StepOutput, TokenLogprob

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HostSample:
    """``Sampled`` on the host. The first dimension of every array counts the tokens decoded in a row."""

    tokens: Array
    """[repeats, rows]."""
    logprobs: Array | None
    """[repeats, rows]."""
    top_tokens: Array | None
    """[repeats, rows, MAX_LOGPROBS]."""
    top_logprobs: Array | None
    """[repeats, rows, MAX_LOGPROBS]."""

    @classmethod
    def fetch(cls, sampled: Sampled, repeats: int) -> HostSample:
        """Wait for the device and copy what a step sampled."""

        def fetch(array: jax.Array | None) -> Array | None:
            if array is None:
                return None
            return np.asarray(array) if repeats > 1 else np.asarray(array)[None]

        tokens = fetch(sampled.tokens)
        assert tokens is not None, "every step samples"
        return cls(tokens, fetch(sampled.logprobs), fetch(sampled.top_tokens), fetch(sampled.top_logprobs))


class NewTokens(NamedTuple):
    """The place in a step's samples of the tokens that a sequence got."""

    sequence: Sequence
    row: int
    """Row of the first token. Further tokens are in the rows after it, or in the same row of the next repeats."""
    known: int
    """Tokens of the sequence before."""


def step_output(new: NewTokens, sampled: HostSample, prompt: PromptResult | None = None) -> StepOutput:
    """Return the output of a sequence for one step."""
    sequence = new.sequence
    request = sequence.request
    return StepOutput(
        request.request_id,
        tuple(sequence.token_ids[new.known :]),
        finish_reason=sequence.finish_reason,
        logprobs=() if request.sampling.logprobs is None else _logprobs(new, sampled, request.sampling.logprobs),
        cached_tokens=sequence.placement.cached_tokens,
        prompt=prompt,
        speculation=sequence.draft.counts,
        error=None if sequence.fault is None else failure(request.request_id, sequence.fault),
    )


def ended_output(sequence: Sequence, reason: FinishReason, fault: Exception | None = None) -> StepOutput:
    """Return the last output of a sequence that ends without new tokens. A ``fault`` is logged."""
    name = sequence.request_id
    error = None if fault is None else failure(name, fault)
    return StepOutput(name, (), reason, cached_tokens=sequence.placement.cached_tokens, error=error)


def _logprobs(new: NewTokens, sampled: HostSample, alternatives: int) -> tuple[TokenLogprob, ...]:
    logprobs = []
    for index, token in enumerate(new.sequence.token_ids[new.known :]):
        repeat, row = (0, new.row + index) if len(sampled.tokens) == 1 else (index, new.row)
        logprobs.append(_logprob(token, sampled, repeat, row, alternatives))
    return tuple(logprobs)


def _logprob(token: int, sampled: HostSample, repeat: int, row: int, alternatives: int) -> TokenLogprob:
    assert sampled.logprobs is not None, "a sequence that wants log-probabilities selects the full sampler"
    assert sampled.top_tokens is not None, "the full sampler reports the likeliest tokens"
    assert sampled.top_logprobs is not None, "the full sampler reports the likeliest tokens"
    ids = sampled.top_tokens[repeat, row, :alternatives].tolist()
    values = sampled.top_logprobs[repeat, row, :alternatives].tolist()
    return TokenLogprob(token, float(sampled.logprobs[repeat, row]), tuple(zip(ids, values, strict=True)))
