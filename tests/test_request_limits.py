"""What an engine takes: wrong types and extremes of every field end in ``RequestError`` before a step sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxdeploy.engine.checks import MAX_FLOAT, MAX_INT32, RequestLimits
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import Request, SamplingParams
from tests.test_config import ODD_VALUES

LIMITS = RequestLimits(100, 50)
NUMBERS = (bool, int, float, str, type(None))


def request(**fields: Any) -> Request:
    return Request(**{"request_id": "a", "prompt_token_ids": (1, 2), **fields})


def accepted(made: Request) -> bool:
    """Whether the engine takes it. Only ``RequestError`` may be raised."""
    try:
        LIMITS.check(made)
    except RequestError:
        return False
    return True


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_any_value_of_a_sampling_field(field: str) -> None:
    for value in ODD_VALUES:
        fields: dict[str, Any] = {field: value}
        if accepted(request(sampling=SamplingParams(**fields))):
            assert isinstance(value, (*NUMBERS, list, tuple, set)), (field, value)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Request) if field.name != "sampling"])
def test_any_value_of_a_request(field: str) -> None:
    taken = [value for value in ODD_VALUES if accepted(request(**{field: value}))]
    if field == "prompt_token_ids":
        assert taken == [[1], (1, 2), {1, 2}]


@pytest.mark.parametrize(
    ("field", "taken", "refused"),
    [
        ("temperature", (0.0, MAX_FLOAT), (-0.1, 1e31)),
        ("top_k", (0, MAX_INT32), (-1, 2**31, 1.0)),
        ("top_p", (0.0, 1.0), (-1e-9, 1.1)),
        ("repetition_penalty", (1e-6, 1e6), (0.0, 1e7)),
        ("max_new_tokens", (1, 10**30), (0, 1.0)),
        ("logprobs", (None, 0, 20), (-1, 21)),
        ("logit_bias", (((49, -100.0),),), (((50, 1.0),), ((-1, 1.0),), ((1, 1e31),), ((1,),), ((True, 1.0),))),
        ("stop_token_ids", (frozenset({10**9}),), (None, 5, "ab", frozenset({"a"}))),
        ("bad_token_sequences", (((1, 2),),), (((),), (1,), None, "ab")),
    ],
)
def test_the_ends_of_ranges(field: str, taken: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    for values, expected in ((taken, True), (refused, False)):
        for value in values:
            fields: dict[str, Any] = {field: value}
            assert accepted(request(sampling=SamplingParams(**fields))) is expected, value
