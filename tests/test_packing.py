"""How a batch is laid out in the packed array of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.engine.device.buckets import ROW_LENGTH, StepShape
from jaxdeploy.engine.device.inputs import SAMPLING_FLOATS, StepFields, packed_size
from jaxdeploy.engine.device.packing import pack
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.blocks import Block
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.messages import Request, SamplingParams

VOCAB = 96
SHAPE = StepShape(decodes=4, prefill_tokens=128, table_length=8, max_sequences=4)


def sequence(length: int, *, slot: int = 0, blocks: tuple[int, ...] = (0,), prompt: int = 1, **kw: Any) -> Sequence:
    """A running one of ``length`` tokens, ``prompt`` of them the prompt."""
    item = Sequence(Request("a", tuple(range(prompt)), SamplingParams(**kw)))
    item.token_ids = list(range(length))
    item.placement.slot, item.placement.prefill_end = slot, length
    item.placement.add_blocks([Block(index, 1) for index in blocks])
    return item


def decode(item: Sequence) -> Chunk:
    """Its last token."""
    return Chunk(item, len(item.token_ids) - 1, 1)


def fields(batch: ScheduledBatch, shape: StepShape = SHAPE) -> StepFields:
    return StepFields.of(pack(shape, batch, VOCAB).inputs.packed, shape)


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, adapted=True), StepShape(4, 0, 8, 4, drafts=3)], ids=str)
def test_the_packed_array_holds_every_field_once(shape: StepShape) -> None:
    packed = np.arange(packed_size(shape), dtype=np.int32)
    parts = StepFields.of(packed, shape)
    assert {name: part.shape for name, part in parts._asdict().items()} == StepFields.sizes(shape)
    assert np.concatenate([part.reshape(-1) for part in parts]).tolist() == packed.tolist()
    assert all(np.shares_memory(part, packed) for part in parts if part.size), "numpy fields are views"
    for view, part in zip(parts, StepFields.of(jnp.asarray(packed), shape), strict=True):
        np.testing.assert_array_equal(view, part)


def test_decoding_sequences() -> None:
    first, second = sequence(20, slot=3, blocks=(7, 2), prompt=5), sequence(2, slot=1, blocks=(4,))
    got = fields(ScheduledBatch((decode(first), decode(second))))
    assert got.slot.tolist() == [3, 1, 0, 0, 0, 0, 0, 0]
    assert got.length.tolist()[:3] == [20, 2, 0]
    assert got.prompt_length.tolist()[:3] == [5, 1, 0]
    assert got.samples.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert got.decode_lengths.tolist() == [1, 1, 0, 0]
    assert got.last_token.tolist()[:2] == [0, 1]
    assert got.block_tables[0].tolist() == [7, 2, 0, 0, 0, 0, 0, 0]
    assert not got.row_tokens.any()


def test_chunks_are_cut_into_rows() -> None:
    done, begun = Chunk(sequence(70, slot=2, blocks=(5,)), 30, 40), Chunk(sequence(90, slot=1, blocks=(6,)), 0, 32)
    got = fields(ScheduledBatch(chunks=(done, begun)))
    assert got.row_sequence.tolist() == [4, 4, 5, 0]
    assert got.row_start.tolist() == [30, 62, 0, 0]
    assert got.row_tokens.tolist() == [32, 8, 32, 0]
    assert got.samples.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]  # the second prompt is not complete
    assert got.slot.tolist()[4:6] == [2, 1]
    first_row = SHAPE.decodes
    assert got.last_token.tolist()[4:6] == [first_row + 39, first_row + 2 * ROW_LENGTH + 31]


def test_settings_travel_bit_by_bit() -> None:
    values: dict[str, Any] = dict(zip(SAMPLING_FLOATS, (0.7, 0.9, 0.05, 1.1, -0.3, 1e-30), strict=True))
    got = fields(ScheduledBatch((decode(sequence(2, top_k=40, seed=2**32 - 1, **values)),)))
    for name, value in values.items():
        assert getattr(got, name).view(np.float32)[0] == np.float32(value)
    assert got.top_k[0] == 40
    assert got.seed.view(np.uint32)[0] == 2**32 - 1


def test_greedy_is_top_k_one() -> None:
    items = sequence(2, temperature=0.0, top_k=40), sequence(2, temperature=1.0, top_k=1)
    got = fields(ScheduledBatch(tuple(decode(item) for item in items)))
    assert got.top_k.tolist()[:2] == [1, 1]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=4).filter(lambda sizes: sum(-(-size // 32) for size in sizes) <= 4),
    starts=st.lists(st.integers(0, 60), min_size=4, max_size=4),
)
def test_rows_cover_every_token_of_a_chunk_once(lengths: list[int], starts: list[int]) -> None:
    chunks = tuple(Chunk(sequence(200), start, size) for start, size in zip(starts, lengths, strict=False))
    got = fields(ScheduledBatch(chunks=chunks))
    for index, chunk in enumerate(chunks, SHAPE.decodes):
        rows = [row for row in range(SHAPE.rows) if got.row_sequence[row] == index and got.row_tokens[row]]
        covered = [got.row_start[row] + offset for row in rows for offset in range(got.row_tokens[row])]
        assert covered == list(range(chunk.start, chunk.start + chunk.length))
        place = got.last_token[index] - SHAPE.decodes
        row, offset = divmod(int(place), ROW_LENGTH)
        assert got.row_start[row] + offset == chunk.start + chunk.length - 1
    assert got.row_tokens.sum() == sum(lengths)
