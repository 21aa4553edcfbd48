"""Static shapes: the finite list of step shapes, and how a scheduled batch is laid out in one of them.

A step has ``decodes`` rows of one token, then ``prefill_tokens`` tokens in rows of ``row_length``. Everything that the
device needs to know about it travels as one int32 array, whose fields ``StepShape.fields`` lists.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxdeploy.engine.checks import MAX_BIASES
from jaxdeploy.engine.device.constraints import forbid
from jaxdeploy.engine.scheduling.scheduler import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.sequence import Reading, Sequence

ROW_LENGTH = 32
"""Most tokens in a row of a prompt chunk; the smallest bucket of prefill tokens."""

ONLY_LAST = 2
"""Of the tokens sampled behind drafts only the last counts: the drafts are known to be right."""

Array = np.ndarray[Any, np.dtype[np.int32]]

SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields that hold the bit patterns of float32 numbers."""

SETTINGS = ("prompt_length", "top_k", "seed", *SAMPLING_FLOATS)
"""Fields that are the same in all steps of a sequence."""


@dataclass(frozen=True)
class StepShape:
    """One static shape. ``table_length`` is M, blocks of the longest sequence; ``max_sequences`` bounds the prompts.

    ``repeats`` tokens are decoded by each sequence, one after the other, in a single launch. Where there are no prompts
    each decode may also verify ``drafts`` tokens: its row has them behind the last that is known, and samples behind
    every one. In an ``adapted`` step sequences may have adapters.
    """

    decodes: int
    prefill_tokens: int
    table_length: int
    max_sequences: int
    repeats: int = 1
    drafts: int = 0
    adapted: bool = False

    def __str__(self) -> str:
        repeats, verified = f" x {self.repeats}" * (self.repeats > 1), f" + {self.drafts} drafts" * (self.drafts > 0)
        return f"({self.decodes}, {self.prefill_tokens})" + repeats + verified + " with adapters" * self.adapted

    @property
    def decode_length(self) -> int:
        """Q of the decode rows."""
        return 1 + self.drafts

    @property
    def row_length(self) -> int:
        """Q of the prefill rows."""
        return min(ROW_LENGTH, self.prefill_tokens)

    @property
    def rows(self) -> int:
        """Number of prefill rows."""
        return self.prefill_tokens // self.row_length if self.prefill_tokens else 0

    @property
    def prompts(self) -> int:
        """Most sequences that can prefill in one step of this shape."""
        return min(self.rows, self.max_sequences)

    @property
    def sequences(self) -> int:
        """Decoding and prefilling sequences."""
        return self.decodes + self.prompts

    @property
    def samples(self) -> int:
        """Rows of logits: one for each sequence, and for each draft."""
        return self.decodes * self.decode_length + self.prompts

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of what the packed array holds, in order. Floats travel as their bit patterns."""
        per_sequence = (
            "slot",  # row of the token buffer
            "prompt_length",
            "length",  # tokens up to the end of this step's: where the (first) new token goes
            "samples",  # 1 if its new tokens count, ONLY_LAST if the last of them does; 0: padding, unfinished prompts
            "last_token",  # index in the step of the token whose logits are sampled from
            "top_k",
            "seed",
            *SAMPLING_FLOATS,
        )
        layout: dict[str, tuple[int, ...]] = dict.fromkeys(per_sequence, (self.sequences,))
        layout["block_tables"] = (self.sequences, self.table_length)
        layout["decode_lengths"] = (self.decodes,)  # 1 and the drafts of this one, or 0 for padding
        layout["drafts"] = (self.decodes, self.drafts)
        for name in ("row_sequence", "row_start", "row_tokens"):
            layout[name] = (self.rows,)
        if self.adapted:
            layout["adapter"] = (self.sequences,)  # slot of its adapter, -1 for none
        return layout


def step_shapes(
    max_batch_size: int,
    max_prefill_tokens: int,
    max_mixed_tokens: int,
    table_length: int,
    decode_steps: int = 1,
    drafts: int = 0,
) -> list[StepShape]:
    """Every shape of a step: decodes in powers of two, prompt chunks alone or, fewer of them, beside all decodes.

    Prompts are what takes the time of a step, so there are shapes for halfway between their powers of two as well.

    Decodes alone also ``decode_steps`` times in one launch, where that is more than one, and with ``drafts``, if any.
    """
    decodes = _powers(1, max_batch_size)
    prefills = _prompt_sizes(max_prefill_tokens)
    pairs = [(count, 0) for count in decodes] + [(0, tokens) for tokens in prefills]
    if max_batch_size > 1:
        pairs += [(decodes[-1], tokens) for tokens in _prompt_sizes(min(max_prefill_tokens, max_mixed_tokens))]
    shapes = [StepShape(count, tokens, table_length, max_batch_size) for count, tokens in pairs]
    if decode_steps > 1:
        shapes += [StepShape(count, 0, table_length, max_batch_size, decode_steps) for count in decodes]
    if drafts:
        shapes += [StepShape(count, 0, table_length, max_batch_size, drafts=drafts) for count in decodes]
    return shapes


def draft_shapes(max_batch_size: int, max_prefill_tokens: int, table_length: int, count: int) -> list[StepShape]:
    """The steps of a model that guesses ``count`` tokens: of prompts, of what it has not seen yet, and one by one."""
    alone = max(count - 1, 1)
    every = step_shapes(max_batch_size, max_prefill_tokens, 0, table_length, alone, count + 1)
    return [
        shape
        for shape in every
        if shape.drafts or (shape.repeats == alone and not shape.prefill_tokens) or not shape.decodes
    ]


def reading_shapes(shapes: list[StepShape]) -> list[StepShape]:
    """The few of ``shapes`` that steps have which read prompts: a compilation of each is enough to wait for."""
    prefills = [shape for shape in shapes if shape.prefill_tokens]
    most = max(shape.decodes for shape in prefills)
    mixed = [shape for shape in prefills if shape.decodes == most]
    largest = max(prefills, key=lambda shape: shape.prefill_tokens)
    long = max(mixed, key=lambda shape: shape.prefill_tokens)
    short = min(mixed, key=lambda shape: abs(shape.prefill_tokens - long.prefill_tokens // 8))
    return list(dict.fromkeys((short, long, largest)))


def with_adapters(shapes: list[StepShape]) -> list[StepShape]:
    """The same for sequences with adapters."""
    return [replace(shape, adapted=True) for shape in shapes]


def choose_shape(shapes: list[StepShape], batch: ScheduledBatch) -> StepShape:
    """The smallest of ``shapes`` that holds ``batch``."""
    fitting = [shape for shape in shapes if _fits(shape, batch)]
    assert fitting, "the scheduler's budget keeps every batch within the largest shape"
    return min(fitting, key=lambda shape: (shape.prefill_tokens, shape.decodes, shape.drafts))


def for_adapters(shape: StepShape, batch: ScheduledBatch) -> tuple[StepShape, ScheduledBatch]:
    """Both for adapters, where a sequence has one: those of the same adapter then stand together."""
    if all(chunk.sequence.adapter is None for chunk in (*batch.decodes, *batch.chunks)):
        return shape, batch
    decodes, chunks = (tuple(sorted(part, key=_adapter_slot)) for part in (batch.decodes, batch.chunks))
    return replace(shape, adapted=True), replace(batch, decodes=decodes, chunks=chunks)


class Choice(NamedTuple):
    """What the full sampler needs of each row beside its fields; numpy arrays here, jax arrays in a step.

    ``allowed`` uint32 [rows, ceil(V / 32)] has the bits of the tokens set that may be chosen. ``bias`` int32
    [rows, 2, MAX_BIASES] has tokens and what is added to their logits, as the bit patterns of float32 numbers.
    """

    allowed: Any
    bias: Any


@dataclass(frozen=True)
class Place:
    """Where a chunk that is read stands in a step: the how many-th of the prompts, from which prompt token on."""

    chunk: Chunk
    prompt: int
    first_token: int


@dataclass(frozen=True)
class ModelInputs:
    """One step as the device takes it: its shape, the packed array, and what the full sampler needs beside it.

    ``rows``: rows of the sampled tokens and what they are sampled behind, for those that get a token in this step; the
    rows that follow are those behind drafts.
    ``choice`` selects the full sampler; with ``None`` the likeliest tokens are taken. ``reading`` is what the step
    tells of the prompts at ``read``. ``faults``: sequences whose forbidden tokens could not be found, with the
    exception; their rows are in the step, and what they sample is dropped.
    """

    shape: StepShape
    packed: Array
    rows: tuple[tuple[int, Chunk], ...] = ()
    choice: Choice | None = None
    reading: Reading = Reading.NOTHING
    read: tuple[Place, ...] = ()
    faults: tuple[tuple[Sequence, Exception], ...] = ()


def build_inputs(shape: StepShape, batch: ScheduledBatch, vocab_size: int, *, free: bool = False) -> ModelInputs:
    """Lay ``batch`` out in ``shape``. Padding rows have length 0 and sample nothing.

    ``free`` leaves out what forbids tokens: for guesses it takes too long to follow a grammar.
    """
    width = shape.decode_length
    chunks = (
        *((width * index, chunk) for index, chunk in enumerate(batch.decodes)),
        *enumerate(batch.chunks, width * shape.decodes),
    )
    rows = tuple((row, chunk) for row, chunk in chunks if chunk.samples)
    reading = reading_of(batch)
    if not reading and not any(chunk.sequence.needs_sampler for _, chunk in rows):
        return ModelInputs(shape, _pack(shape, batch), rows)
    choice = _any_token(shape, vocab_size)
    faults = () if free else _forbid(choice, rows)
    choice = choice._replace(bias=_biases(shape, rows))
    return ModelInputs(shape, _pack(shape, batch), rows, choice, reading, tuple(_places_read(shape, batch)), faults)


def _forbid(choice: Choice, rows: Iterable[tuple[int, Chunk]]) -> tuple[tuple[Sequence, Exception], ...]:
    """Clear what each row may not have. Returns the sequences for which that failed."""
    faults = []
    for row, chunk in rows:
        try:
            forbid(choice.allowed, row, chunk.sequence, chunk.first_new, chunk.drafts)
        except Exception as error:  # a grammar's matcher may raise anything
            faults.append((chunk.sequence, error))
    return tuple(faults)


def reading_of(batch: ScheduledBatch) -> Reading:
    """What a step must tell of its prompts: the most that one of them is read for."""
    return max((chunk.sequence.reading for chunk in batch.chunks), default=Reading.NOTHING)


def padding_inputs(
    shape: StepShape, vocab_size: int, *, full_sampler: bool, reading: Reading = Reading.NOTHING
) -> ModelInputs:
    """A step of nothing but padding, to warm up with."""
    packed = np.zeros(packed_size(shape), np.int32)
    return ModelInputs(shape, packed, choice=_any_token(shape, vocab_size) if full_sampler else None, reading=reading)


def _places_read(shape: StepShape, batch: ScheduledBatch) -> Iterator[Place]:
    row = 0
    for prompt, chunk in enumerate(batch.chunks):
        if chunk.sequence.reading:
            yield Place(chunk, prompt, row * shape.row_length)
        row += -(-chunk.length // shape.row_length)


def _any_token(shape: StepShape, vocab_size: int) -> Choice:
    """Nothing is forbidden, nothing preferred."""
    return Choice(np.full((shape.samples, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32), _no_bias(shape.samples))


@functools.cache
def _no_bias(rows: int) -> Array:
    return np.zeros((rows, 2, MAX_BIASES), np.int32)


def _biases(shape: StepShape, rows: Iterable[tuple[int, Chunk]]) -> Array:
    wanted = [(row, chunk) for row, chunk in rows if chunk.sequence.sampling.logit_bias]
    bias = _no_bias(shape.samples)
    if wanted:
        bias = bias.copy()
    for row, chunk in wanted:
        biases = chunk.sequence.sampling.logit_bias
        tokens, values = zip(*biases, strict=True)
        behind = bias[row : row + 1 + len(chunk.drafts)]
        behind[:, 0, : len(biases)] = tokens
        behind[:, 1, : len(biases)] = np.array(values, np.float32).view(np.int32)
    return bias


def _pack(shape: StepShape, batch: ScheduledBatch) -> Array:
    packed = np.zeros(packed_size(shape), np.int32)
    fields = unpack(packed, shape)
    _fill_sequences(fields, 0, batch.decodes)
    _fill_sequences(fields, shape.decodes, batch.chunks)
    if shape.adapted:
        fields["adapter"][:] = -1
        fields["adapter"][: len(batch.decodes)] = [_adapter_slot(chunk) for chunk in batch.decodes]
        chunks = slice(shape.decodes, shape.decodes + len(batch.chunks))
        fields["adapter"][chunks] = [_adapter_slot(chunk) for chunk in batch.chunks]
    fields["decode_lengths"][: len(batch.decodes)] = 1
    for index, chunk in enumerate(batch.decodes if shape.drafts else ()):
        fields["decode_lengths"][index] += len(chunk.drafts)
        fields["samples"][index] = 1 if chunk.verifies else ONLY_LAST
        fields["drafts"][index, : len(chunk.drafts)] = chunk.drafts
    fields["last_token"][: len(batch.decodes)] = np.arange(len(batch.decodes))
    row = 0
    for index, chunk in enumerate(batch.chunks, shape.decodes):
        row = _fill_chunk(fields, shape, index, row, chunk)
    return packed


def packed_size(shape: StepShape) -> int:
    """Number of int32 in the packed array of ``shape``."""
    return _places(shape)[-1][2]


def unpack(packed: Any, shape: StepShape) -> dict[str, Any]:
    """The fields of a packed array by name: views of a numpy array, slices of a jax one."""
    return {name: packed[start:end].reshape(size) for name, start, end, size in _places(shape)}


@functools.cache
def _places(shape: StepShape) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """Name, start, end and shape of every field."""
    places, start = [], 0
    for name, size in shape.fields().items():
        end = start + math.prod(size)
        places.append((name, start, end, size))
        start = end
    return places


def _fill_sequences(fields: Mapping[str, Array], first: int, chunks: tuple[Chunk, ...]) -> None:
    """The per-sequence fields of ``chunks``, in rows from ``first`` on: field by field, which numpy takes faster."""
    if not chunks:
        return
    sequences = [chunk.sequence for chunk in chunks]
    rows = slice(first, first + len(sequences))
    fields["slot"][rows] = [_slot(sequence) for sequence in sequences]
    fields["length"][rows] = [chunk.first_new for chunk in chunks]
    fields["samples"][rows] = [chunk.samples for chunk in chunks]
    settings = _joined(settings_of(sequence) for sequence in sequences).reshape(-1, len(SETTINGS))
    for name, column in zip(SETTINGS, settings.T, strict=True):
        fields[name][rows] = column
    tables = fields["block_tables"][rows]
    lengths = np.array([len(sequence.block_table) for sequence in sequences], np.int32)
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = _joined(sequence.block_table for sequence in sequences)


def _joined(parts: Iterable[array[int]]) -> Array:
    """Arrays of int32 one behind the other; numpy would take each of them by itself."""
    return np.frombuffer(b"".join(parts), np.int32)


def settings_of(sequence: Sequence) -> array[int]:
    """What is the same in all its steps, in the order of ``SETTINGS``."""
    if sequence.settings is None:
        sampling = sequence.sampling
        floats = np.array([getattr(sampling, name) for name in SAMPLING_FLOATS], np.float32)
        seed = np.array(sampling.seed & 0xFFFFFFFF, np.uint32)
        top_k = 1 if sampling.greedy else sampling.top_k
        bits = int(seed.view(np.int32)), *floats.view(np.int32).tolist()
        sequence.settings = array("i", (sequence.prompt_length, top_k, *bits))
    return sequence.settings


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a scheduled sequence has a slot"
    return sequence.slot


def _adapter_slot(chunk: Chunk) -> int:
    adapter = chunk.sequence.adapter
    if adapter is None:
        return -1
    assert adapter.slot is not None, "a scheduled sequence's adapter has a slot"
    return adapter.slot


def _fill_chunk(fields: Mapping[str, Array], shape: StepShape, index: int, row: int, chunk: Chunk) -> int:
    """Cut ``chunk`` into rows from ``row`` on; returns the next free row."""
    for offset in range(0, chunk.length, shape.row_length):
        fields["row_sequence"][row] = index
        fields["row_start"][row] = chunk.start + offset
        fields["row_tokens"][row] = tokens = min(shape.row_length, chunk.length - offset)
        row += 1
    fields["last_token"][index] = shape.decodes + (row - 1) * shape.row_length + tokens - 1
    return row


def _fits(shape: StepShape, batch: ScheduledBatch) -> bool:
    most = max((len(chunk.drafts) for chunk in batch.decodes), default=0)
    if shape.repeats != batch.repeats or bool(shape.drafts) != bool(most) or shape.drafts < most:
        return False
    if len(batch.decodes) > shape.decodes or len(batch.chunks) > shape.prompts:
        return False
    return sum(-(-chunk.length // shape.row_length) for chunk in batch.chunks) <= shape.rows


def _prompt_sizes(last: int) -> list[int]:
    """Whole rows: powers of two of them, and halfway between, up to and including ``last`` tokens."""
    powers = _powers(ROW_LENGTH, last)
    between = [(less + more) // 2 for less, more in pairwise(powers)]
    return sorted({*powers, *(tokens for tokens in between if tokens % ROW_LENGTH == 0)})


def _powers(first: int, last: int) -> list[int]:
    """``first``, then doubling, up to and including ``last``."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes
