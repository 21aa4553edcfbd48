"""The shapes of an engine, and the choice of one for a batch."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest

from jaxdeploy.engine.device.buckets import BucketTable, StepShape, step_shapes
from jaxdeploy.engine.device.packing import choose_bucket
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request

GPU_SHAPES = step_shapes(128, 8192, 2048, 512, drafts=7)
"""The shapes of an engine with default sizes on a GPU, with drafts."""


def test_shapes_are_few() -> None:
    shapes = [(shape.decodes, shape.prefill_tokens) for shape in step_shapes(6, 224, 64, 8)]
    decodes = [(1, 0), (2, 0), (4, 0), (6, 0)]
    prefills = [(0, 32), (0, 64), (0, 96), (0, 128), (0, 224)]  # between 128 and 224 is no whole number of rows
    assert shapes == [*decodes, *prefills, (6, 32), (6, 64)]
    assert (len(step_shapes(128, 8192, 2048, 512)), len(GPU_SHAPES)) == (36, 44)


def test_one_sequence_never_decodes_with_a_prompt() -> None:
    assert [(shape.decodes, shape.prefill_tokens) for shape in step_shapes(1, 32, 32, 8)] == [(1, 0), (0, 32)]


@pytest.mark.parametrize(
    ("decodes", "lengths", "chosen"),
    [
        (1, [], (1, 0)),
        (3, [], (4, 0)),
        (0, [32], (0, 32)),
        (0, [33], (0, 64)),
        (0, [1, 1], (0, 64)),  # a row belongs to one prompt
        (0, [1, 1, 1], (0, 96)),
        (0, [1, 1, 33], (0, 128)),
        (2, [5], (8, 32)),
        (8, [100], (8, 128)),
    ],
)
def test_the_smallest_shape_that_fits(decodes: int, lengths: list[int], chosen: tuple[int, int]) -> None:
    shape = BucketTable(step_shapes(8, 128, 128, 8)).choose(decodes, lengths)
    assert (shape.decodes, shape.prefill_tokens) == chosen


@pytest.mark.parametrize("batch", [{"decodes": 5}, {"decodes": 1, "drafts": 1}, {"decodes": 1, "repeats": 2}])
def test_a_batch_beyond_every_shape_is_our_own_mistake(batch: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="largest shape"):
        BucketTable([StepShape(4, 128, 8, 4)]).choose(**batch)


def fits(shape: StepShape, decodes: int, lengths: list[int], drafts: int, repeats: int) -> bool:
    if shape.repeats != repeats or bool(shape.drafts) != bool(drafts) or shape.drafts < drafts:
        return False
    if decodes > shape.decodes or len(lengths) > shape.prompts:
        return False
    return sum(-(-length // shape.row_length) for length in lengths) <= shape.rows


def first_of_all(
    shapes: list[StepShape], decodes: int, lengths: list[int], drafts: int, repeats: int
) -> StepShape | None:
    """The rule: of the shapes that fit, the smallest, found by looking at every one."""
    fitting = [shape for shape in shapes if fits(shape, decodes, lengths, drafts, repeats)]
    return min(fitting, key=lambda shape: (shape.prefill_tokens, shape.decodes, shape.drafts), default=None)


def some_shapes(dice: random.Random) -> list[StepShape]:
    """A list in any order, with gaps that no engine has."""
    max_sequences = dice.randint(1, 4)
    return [
        StepShape(
            decodes=dice.choice((0, 1, 2, 3, 4, 8)),
            prefill_tokens=dice.choice((0, 5, 31, 32, 33, 64, 96, 128)),
            table_length=8,
            max_sequences=max_sequences,
            repeats=dice.choice((1, 1, 1, 4)),
            drafts=dice.choice((0, 0, 2, 5)),
        )
        for _ in range(dice.randint(1, 40))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_bisection_chooses_what_a_search_of_all_shapes_chooses(seed: int) -> None:
    dice = random.Random(seed)
    chosen = 0
    for _ in range(200):
        shapes = dice.choice((some_shapes(dice), step_shapes(6, 224, 96, 8, 4, 5)))
        buckets = BucketTable(shapes)
        for _ in range(10):
            decodes, drafts, repeats = (
                dice.choice((0, 1, 2, 3, 4, 8)),
                dice.choice((0, 0, 1, 2, 3, 6)),
                dice.choice((1, 4)),
            )
            lengths = [dice.randint(1, 70) for _ in range(dice.choice((0, 0, 1, 2, 5)))]
            expected = first_of_all(shapes, decodes, lengths, drafts, repeats)
            if expected is None:
                with pytest.raises(AssertionError, match="scheduler's budget"):
                    buckets.choose(decodes, lengths, drafts=drafts, repeats=repeats)
            else:
                assert buckets.choose(decodes, lengths, drafts=drafts, repeats=repeats) == expected
                chosen += 1
    assert chosen > 500


@pytest.mark.parametrize("drafts", [0, 7])
def test_a_choice_makes_few_calls_whatever_the_batch(drafts: int) -> None:
    """A search of all shapes made 116 calls for one decode, and thousands for 128."""
    buckets = BucketTable(GPU_SHAPES)
    decodes = tuple(Chunk(Sequence(Request("a", (1,))), 0, 1 + drafts, (1,) * drafts) for _ in range(128))
    calls = []

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        shape = choose_bucket(buckets, ScheduledBatch(decodes))
    finally:
        sys.setprofile(None)
    assert (shape.decodes, shape.drafts) == (128, drafts)
    assert len(calls) <= 8, calls
