"""Collects what the steps that compute a prompt return for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxdeploy.engine.device.prompt_rows import PromptRows
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.batch import PromptPlace
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.errors import NonFiniteError
from jaxdeploy.messages import PromptResult, TokenLogprob


class PromptCollector:
    """Sums up hidden states and collects log-probabilities of one prompt, chunk by chunk."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._sum: Any = 0.0
        self._last: Any = None
        self._logprobs: list[TokenLogprob] = []

    def add(self, place: PromptPlace, rows: PromptRows) -> None:
        """Add what a step returned for the chunk at ``place``.

        A chunk that starts at 0 replaces everything, because a preempted prompt is computed again.
        """
        start = place.chunk.start
        if start == 0:
            self._sum = 0.0
            self._logprobs = []
        self._sum = self._sum + np.asarray(rows.sums)[place.prompt]
        self._last = np.asarray(rows.last)[place.prompt]
        alternatives = self._sequence.sampling.prompt_logprobs
        if alternatives is None or rows.logprobs is None or rows.top_tokens is None or rows.top_logprobs is None:
            return
        count = min(place.chunk.end, self._sequence.prompt_length - 1) - start
        chunk = slice(place.first_token, place.first_token + count)
        tokens = self._sequence.token_ids[start + 1 : start + 1 + count]
        values = np.asarray(rows.logprobs)[chunk].tolist()
        top_ids = np.asarray(rows.top_tokens)[chunk, :alternatives].tolist()
        top_values = np.asarray(rows.top_logprobs)[chunk, :alternatives].tolist()
        for token, value, *top in zip(tokens, values, top_ids, top_values, strict=True):
            self._logprobs.append(TokenLogprob(token, value, tuple(zip(*top, strict=True))))

    def result(self) -> PromptResult:
        """Return the outputs of the whole prompt. Raises ``NonFiniteError``."""
        mean, last = self._sum / self._sequence.prompt_length, self._last
        if not (np.isfinite(mean).all() and np.isfinite(last).all()):
            raise NonFiniteError("the hidden states of the prompt are not finite; check the weights and the adapter")
        return PromptResult(tuple(mean.tolist()), tuple(last.tolist()), tuple(self._logprobs))


class PromptCollectors:
    """The collectors of all sequences that have not returned their prompt outputs."""

    def __init__(self) -> None:
        self._collectors: dict[Sequence, PromptCollector] = {}

    def __len__(self) -> int:
        return len(self._collectors)

    def start(self, sequence: Sequence) -> None:
        """Collect the prompt outputs of a sequence, if it has any."""
        if sequence.prompt_outputs:
            self._collectors[sequence] = PromptCollector(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Stop collecting for a sequence that ends."""
        self._collectors.pop(sequence, None)

    def add(self, places: Iterable[PromptPlace], rows: PromptRows | None) -> list[tuple[Sequence, Exception]]:
        """Add what a step returned. Returns the sequences for which that failed."""
        faults = []
        for place in places:
            sequence = place.chunk.sequence
            collector = self._collectors.get(sequence)
            if collector is None or rows is None:
                continue
            try:
                collector.add(place, rows)
            except Exception as error:  # the other sequences continue
                faults.append((sequence, error))
        return faults

    def result(self, sequence: Sequence) -> PromptResult:
        """Return the prompt outputs of a sequence, once: they come with its first token."""
        sequence.prompt_outputs = PromptOutputs.NONE
        return self._collectors.pop(sequence).result()
