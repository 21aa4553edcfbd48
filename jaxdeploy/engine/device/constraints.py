"""Bit masks of the tokens that a sequence may take next: no bad words, no early stops, and what its grammar allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxdeploy.engine.scheduling.sequence import Sequence

Mask = np.ndarray[Any, np.dtype[np.uint32]]


def forbid(mask: Mask, row: int, sequence: Sequence, length: int, drafts: tuple[int, ...] = ()) -> None:
    """Clear the bits of tokens that ``sequence`` may not take at ``length`` in ``mask[row]``, uint32 [rows, V / 32].

    The next rows are for the positions after each of ``drafts``.
    """
    for known in range(len(drafts) + 1):
        for token in _forbidden(sequence, length + known, drafts[:known]):
            if 0 <= token < mask.shape[1] * 32:
                mask[row + known, token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    if sequence.matcher is not None:
        sequence.matcher.allow(mask[row : row + len(drafts) + 1], drafts)


def _forbidden(sequence: Sequence, length: int, drafts: tuple[int, ...]) -> Iterable[int]:
    sampling = sequence.sampling
    if length < sequence.prompt_length + sampling.min_new_tokens:
        yield from sampling.stop_token_ids
    for words in sampling.bad_token_sequences:
        *start, last = words
        if not start or _ends_with(sequence, length, drafts, start):
            yield last


def _ends_with(sequence: Sequence, length: int, drafts: tuple[int, ...], words: list[int]) -> bool:
    known = len(sequence.token_ids)
    assert length == known + len(drafts), "the tokens before must be known"
    return [*sequence.token_ids[max(known - len(words), 0) :], *drafts][-len(words) :] == words
