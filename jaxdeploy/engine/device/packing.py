"""From a scheduled batch to the inputs of a step: the only place that pads."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxdeploy.engine.device.buckets import BucketTable, StepShape
from jaxdeploy.engine.device.constraints import forbid
from jaxdeploy.engine.device.inputs import (
    LAST_SAMPLE,
    SETTINGS,
    Array,
    ModelInputs,
    SamplingConstraints,
    StepFields,
    no_bias,
    no_constraints,
    packed_size,
)
from jaxdeploy.engine.device.sampler import NOT_FINITE
from jaxdeploy.engine.device.settings import settings_of
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.batch import Chunk, PromptPlace, ScheduledBatch
from jaxdeploy.engine.scheduling.sequence import Sequence


@dataclass(frozen=True)
class PackedBatch:
    """A batch, the inputs made from it, and the rows in which the results of its chunks arrive."""

    batch: ScheduledBatch
    """In the order of the rows."""
    inputs: ModelInputs
    rows: tuple[tuple[int, Chunk], ...] = ()
    """First row of samples of each chunk that gets a token. The rows after it belong to its drafts."""
    prompts: tuple[PromptPlace, ...] = ()
    """Chunks whose prompts have outputs."""
    faults: tuple[tuple[Sequence, Exception], ...] = ()
    """Sequences whose constraints raised. Their rows are in the step; drop what they sample."""


def choose_bucket(buckets: BucketTable, batch: ScheduledBatch) -> StepShape:
    """Return the smallest shape that holds ``batch``."""
    lengths = [chunk.length for chunk in batch.chunks]
    return buckets.choose(len(batch.decodes), lengths, drafts=batch.max_drafts, repeats=batch.repeats)


def for_adapters(shape: StepShape, batch: ScheduledBatch) -> tuple[StepShape, ScheduledBatch]:
    """Return shape and batch of an adapted step if any sequence has an adapter.

    Sequences with the same adapter are then neighbours.
    """
    if all(chunk.sequence.adapter is None for chunk in (*batch.decodes, *batch.chunks)):
        return shape, batch
    decodes = tuple(sorted(batch.decodes, key=_adapter_slot))
    chunks = tuple(sorted(batch.chunks, key=_adapter_slot))
    return replace(shape, adapted=True), replace(batch, decodes=decodes, chunks=chunks)


def pack(shape: StepShape, batch: ScheduledBatch, vocab_size: int, *, constrain: bool = True) -> PackedBatch:
    """Lay ``batch`` out in ``shape``. Padding rows have length 0 and sample nothing.

    Without ``constrain`` nothing is forbidden: drafts do not follow grammars, which would take too long.
    """
    width = shape.decode_length
    places = (
        *((width * index, chunk) for index, chunk in enumerate(batch.decodes)),
        *enumerate(batch.chunks, width * shape.decodes),
    )
    rows = tuple((row, chunk) for row, chunk in places if batch.samples and chunk.samples)
    packed = _packed_fields(shape, batch)
    outputs = prompt_outputs_of(batch)
    if not outputs and not any(chunk.sequence.needs_sampler for _, chunk in rows):
        return PackedBatch(batch, ModelInputs(shape, packed), rows)
    constraints = no_constraints(shape, vocab_size)
    faults = _forbid(constraints, rows) if constrain else ()
    constraints = constraints._replace(bias=_biases(shape, rows))
    inputs = ModelInputs(shape, packed, constraints, outputs)
    return PackedBatch(batch, inputs, rows, tuple(_prompt_places(shape, batch)), faults)


def not_finite(packed: PackedBatch, tokens: np.ndarray[Any, Any]) -> Iterator[tuple[Chunk, list[int]]]:
    """Return the chunks with a ``NOT_FINITE`` sample in ``tokens`` [repeats, rows], and their block tables."""
    shape, batch = packed.inputs.shape, packed.batch
    tables = StepFields.of(packed.inputs.packed, shape).block_tables
    width = shape.decode_length
    places = [(width * index, index, chunk) for index, chunk in enumerate(batch.decodes)]
    places += [
        (width * shape.decodes + index, shape.decodes + index, chunk) for index, chunk in enumerate(batch.chunks)
    ]
    for row, index, chunk in places:
        if (tokens[:, row : row + 1 + len(chunk.drafts)] == NOT_FINITE).any():
            yield chunk, tables[index].tolist()


def prompt_outputs_of(batch: ScheduledBatch) -> PromptOutputs:
    """Return what a step must return for its prompts: the most that any of them needs."""
    return max((chunk.sequence.prompt_outputs for chunk in batch.chunks), default=PromptOutputs.NONE)


def _forbid(
    constraints: SamplingConstraints, rows: Iterable[tuple[int, Chunk]]
) -> tuple[tuple[Sequence, Exception], ...]:
    """Clear the tokens that each row may not take. Returns the sequences for which that failed."""
    faults = []
    for row, chunk in rows:
        try:
            forbid(constraints.allowed, row, chunk.sequence, chunk.first_new, chunk.drafts)
        except Exception as error:  # a grammar's matcher may raise anything
            faults.append((chunk.sequence, error))
    return tuple(faults)


def _prompt_places(shape: StepShape, batch: ScheduledBatch) -> Iterator[PromptPlace]:
    row = 0
    for prompt, chunk in enumerate(batch.chunks):
        if chunk.sequence.prompt_outputs:
            yield PromptPlace(chunk, prompt, row * shape.row_length)
        row += -(-chunk.length // shape.row_length)


def _biases(shape: StepShape, rows: Iterable[tuple[int, Chunk]]) -> Array:
    biased = [(row, chunk) for row, chunk in rows if chunk.sequence.sampling.logit_bias]
    if not biased:
        return no_bias(shape.samples)
    bias = no_bias(shape.samples).copy()
    for row, chunk in biased:
        biases = chunk.sequence.sampling.logit_bias
        tokens, values = zip(*biases, strict=True)
        rows_of_chunk = bias[row : row + 1 + len(chunk.drafts)]
        rows_of_chunk[:, 0, : len(biases)] = tokens
        rows_of_chunk[:, 1, : len(biases)] = np.array(values, np.float32).view(np.int32)
    return bias


def _packed_fields(shape: StepShape, batch: ScheduledBatch) -> Array:
    packed = np.zeros(packed_size(shape), np.int32)
    fields = StepFields.of(packed, shape)
    _fill_sequences(fields, 0, batch.decodes)
    _fill_sequences(fields, shape.decodes, batch.chunks)
    if shape.adapted:
        _fill_adapters(fields, shape, batch)
    decodes = len(batch.decodes)
    fields.decode_lengths[:decodes] = 1
    fields.last_token[:decodes] = np.arange(decodes)
    if shape.drafts:
        _fill_drafts(fields, batch)
    row = 0
    for index, chunk in enumerate(batch.chunks, shape.decodes):
        row = _fill_chunk(fields, shape, index, row, chunk)
    if not batch.samples:
        fields.samples[:] = 0
    return packed


def _fill_sequences(fields: StepFields, first: int, chunks: tuple[Chunk, ...]) -> None:
    """Fill the per-sequence fields of ``chunks`` from row ``first``, field by field, which is faster in numpy."""
    if not chunks:
        return
    sequences = [chunk.sequence for chunk in chunks]
    rows = slice(first, first + len(sequences))
    fields.slot[rows] = [_slot(sequence) for sequence in sequences]
    fields.length[rows] = [chunk.first_new for chunk in chunks]
    fields.samples[rows] = [chunk.samples for chunk in chunks]
    settings = _joined(settings_of(sequence) for sequence in sequences).reshape(-1, len(SETTINGS))
    for name, column in zip(SETTINGS, settings.T, strict=True):
        getattr(fields, name)[rows] = column
    tables = fields.block_tables[rows]
    lengths = np.array([len(sequence.placement.block_table) for sequence in sequences], np.int32)
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = _joined(
        sequence.placement.block_table for sequence in sequences
    )


def _fill_adapters(fields: StepFields, shape: StepShape, batch: ScheduledBatch) -> None:
    chunks = slice(shape.decodes, shape.decodes + len(batch.chunks))
    fields.adapter[:] = -1
    fields.adapter[: len(batch.decodes)] = [_adapter_slot(chunk) for chunk in batch.decodes]
    fields.adapter[chunks] = [_adapter_slot(chunk) for chunk in batch.chunks]


def _fill_drafts(fields: StepFields, batch: ScheduledBatch) -> None:
    for index, chunk in enumerate(batch.decodes):
        fields.decode_lengths[index] += len(chunk.drafts)
        fields.samples[index] = 1 if chunk.verifies else LAST_SAMPLE
        fields.drafts[index, : len(chunk.drafts)] = chunk.drafts


def _fill_chunk(fields: StepFields, shape: StepShape, index: int, row: int, chunk: Chunk) -> int:
    """Cut ``chunk`` into rows from ``row``; returns the next free row."""
    for offset in range(0, chunk.length, shape.row_length):
        tokens = min(shape.row_length, chunk.length - offset)
        fields.row_sequence[row] = index
        fields.row_start[row] = chunk.start + offset
        fields.row_tokens[row] = tokens
        row += 1
    fields.last_token[index] = shape.decodes + (row - 1) * shape.row_length + tokens - 1
    return row


def _joined(parts: Iterable[array[int]]) -> Array:
    """Concatenate arrays of int32 as bytes; numpy would convert each of them separately."""
    return np.frombuffer(b"".join(parts), np.int32)


def _slot(sequence: Sequence) -> int:
    assert sequence.placement.slot is not None, "a scheduled sequence has a slot"
    return sequence.placement.slot


def _adapter_slot(chunk: Chunk) -> int:
    adapter = chunk.sequence.adapter
    if adapter is None:
        return -1
    assert adapter.slot is not None, "a scheduled sequence's adapter has a slot"
    return adapter.slot
