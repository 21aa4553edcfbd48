"""Which tokens a sequence may not take next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxdeploy.engine.device.constraints import forbid
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request, SamplingParams

WORDS = 3


def forbidden(prompt: list[int], output: list[int], row: int = 0, **sampling: Any) -> list[int]:
    """Tokens whose bit is cleared in ``row``, every other row being untouched."""
    item = Sequence(Request("a", tuple(prompt), SamplingParams(**sampling)))
    item.token_ids += output
    mask = np.full((2, WORDS), 0xFFFFFFFF, np.uint32)
    forbid(mask, row, item, len(item.token_ids))
    assert (mask[1 - row] == 0xFFFFFFFF).all()
    return [token for token in range(32 * WORDS) if not int(mask[row, token // 32]) >> token % 32 & 1]


def test_nothing_is_forbidden_by_default() -> None:
    assert forbidden([1], [2], stop_token_ids=frozenset({5})) == []


def test_a_bad_token_is_always_forbidden() -> None:
    assert forbidden([1], [], 1, bad_token_sequences=((0,), (31,), (32,), (95,))) == [0, 31, 32, 95]


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ([1], [7, 8], [9]),
        ([7], [8], [9]),  # a bad word may begin in the prompt
        ([7, 8], [], [9]),
        ([1], [8], []),
        ([1], [7], []),
        ([1], [7, 8, 1], []),
        ([8], [], []),
    ],
)
def test_the_last_token_of_a_bad_word_is_forbidden_after_its_others(
    prompt: list[int], output: list[int], expected: list[int]
) -> None:
    assert forbidden(prompt, output, bad_token_sequences=((7, 8, 9),)) == expected


def test_a_bad_word_longer_than_the_sequence() -> None:
    assert forbidden([1], [], bad_token_sequences=((1, 1, 1, 2),)) == []


@pytest.mark.parametrize(("generated", "expected"), [(0, [3, 50]), (1, [3, 50]), (2, []), (3, [])])
def test_stops_are_forbidden_before_min_new_tokens(generated: int, expected: list[int]) -> None:
    stops = frozenset({3, 50})
    assert forbidden([1, 3], [2] * generated, stop_token_ids=stops, min_new_tokens=2) == expected


def test_ids_outside_the_vocabulary_do_nothing() -> None:
    assert forbidden([1], [], bad_token_sequences=((96,), (10**6,), (-1,))) == []


@pytest.mark.parametrize(("length", "expected"), [(3, [3]), (4, [])])
def test_tokens_in_flight_count(length: int, expected: list[int]) -> None:
    item = Sequence(Request("a", (1, 2), SamplingParams(stop_token_ids=frozenset({3}), min_new_tokens=2)))
    mask = np.full((1, WORDS), 0xFFFFFFFF, np.uint32)
    forbid(mask, 0, item, length)
    assert [token for token in range(32) if not int(mask[0, 0]) >> token & 1] == expected
