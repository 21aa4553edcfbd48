"""Buckets: the finite list of static step shapes, and which of them a batch takes.

A step has ``decodes`` rows of one token, followed by ``prefill_tokens`` tokens in rows of ``row_length``. JAX compiles
one program per shape, so the list is short and every batch is padded to one of its shapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

ROW_LENGTH = 32
"""Maximum tokens in a row of a prompt chunk, and the smallest bucket of prefill tokens."""


@dataclass(frozen=True)
class StepShape:
    """One static shape of a step."""

    decodes: int
    """Rows of decoding sequences."""
    prefill_tokens: int
    """Prompt tokens, padding included."""
    table_length: int
    """M: blocks of the longest sequence."""
    max_sequences: int
    """Upper bound of the prompts in one step."""
    repeats: int = 1
    """Tokens that each sequence decodes in one launch, one after the other."""
    drafts: int = 0
    """Draft tokens that a decode row can verify. The row holds the last known token and then the drafts."""
    adapted: bool = False
    """Whether sequences may have LoRA adapters."""

    def __str__(self) -> str:
        text = f"({self.decodes}, {self.prefill_tokens})"
        if self.repeats > 1:
            text += f" x {self.repeats}"
        if self.drafts:
            text += f" + {self.drafts} drafts"
        if self.adapted:
            text += " with adapters"
        return text

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
        """Maximum number of sequences that prefill in one step of this shape."""
        return min(self.rows, self.max_sequences)

    @property
    def sequences(self) -> int:
        """Decoding and prefilling sequences."""
        return self.decodes + self.prompts

    @property
    def adapted_sequences(self) -> int:
        """Sequences that may have an adapter."""
        return self.sequences if self.adapted else 0

    @property
    def samples(self) -> int:
        """Rows of logits: one per sequence and one per draft."""
        return self.decodes * self.decode_length + self.prompts


class BucketTable:
    """Chooses the smallest shape that holds a batch, with three bisections.

    The smallest shape has the fewest prefill tokens, then the fewest decodes, then the fewest drafts.
    """

    def __init__(self, shapes: Sequence[StepShape]) -> None:
        assert len({(shape.table_length, shape.max_sequences) for shape in shapes}) == 1, (
            "shapes differ in their bounds"
        )
        self._max_sequences = shapes[0].max_sequences
        self._kinds = {kind: _Kind(list(group)) for kind, group in _by_kind(shapes).items()}

    def choose(
        self, decodes: int, prompt_lengths: Sequence[int] = (), *, drafts: int = 0, repeats: int = 1
    ) -> StepShape:
        """Return the smallest shape that holds a batch.

        Args:
            decodes: number of decoding sequences.
            prompt_lengths: tokens of each prompt chunk.
            drafts: most drafts of any decoding sequence.
            repeats: tokens that each sequence decodes in the step.
        """
        kind = self._kinds.get((repeats, drafts > 0))
        shape = kind.smallest(decodes, _prefill_tokens(prompt_lengths), drafts) if kind else None
        assert shape is not None, "the scheduler's budget keeps every batch within the largest shape"
        assert len(prompt_lengths) <= self._max_sequences, "the scheduler's budget keeps every batch within the shape"
        return shape


class _Kind:
    """Shapes that agree in ``repeats`` and in whether they verify drafts."""

    def __init__(self, shapes: list[StepShape]) -> None:
        self._drafts = sorted({shape.drafts for shape in shapes})
        self._decodes = sorted({shape.decodes for shape in shapes})
        # One column per lower bound of drafts and of decodes: the best shape of each prefill size, ascending.
        self._columns = [
            [_column(shapes, min_decodes=decodes, min_drafts=drafts) for decodes in self._decodes]
            for drafts in self._drafts
        ]
        self._prefill_sizes = [[[shape.prefill_tokens for shape in column] for column in row] for row in self._columns]

    def smallest(self, decodes: int, prefill_tokens: int, drafts: int) -> StepShape | None:
        """Return the smallest shape with at least these sizes, or ``None`` if there is none."""
        row = bisect_left(self._drafts, drafts)
        column = bisect_left(self._decodes, decodes)
        if row == len(self._drafts) or column == len(self._decodes):
            return None
        sizes = self._prefill_sizes[row][column]
        index = bisect_left(sizes, prefill_tokens)
        return self._columns[row][column][index] if index < len(sizes) else None


def _by_kind(shapes: Sequence[StepShape]) -> dict[tuple[int, bool], list[StepShape]]:
    kinds: dict[tuple[int, bool], list[StepShape]] = {}
    for shape in shapes:
        kinds.setdefault((shape.repeats, shape.drafts > 0), []).append(shape)
    return kinds


def _column(shapes: list[StepShape], *, min_decodes: int, min_drafts: int) -> list[StepShape]:
    """Return the smallest shape of every prefill size among those with enough decodes and drafts."""
    best: dict[int, StepShape] = {}
    for shape in sorted(shapes, key=lambda shape: (shape.prefill_tokens, shape.decodes, shape.drafts)):
        if shape.decodes >= min_decodes and shape.drafts >= min_drafts:
            best.setdefault(shape.prefill_tokens, shape)
    return list(best.values())


def _prefill_tokens(lengths: Sequence[int]) -> int:
    """Return the smallest ``prefill_tokens`` that holds prompt chunks of these lengths. Rows are not shared."""
    if not lengths:
        return 0
    if len(lengths) == 1 and lengths[0] < ROW_LENGTH:
        return lengths[0]
    return ROW_LENGTH * sum([-(-length // ROW_LENGTH) for length in lengths])


def step_shapes(
    max_batch_size: int,
    max_prefill_tokens: int,
    max_mixed_tokens: int,
    table_length: int,
    decode_steps: int = 1,
    drafts: int = 0,
) -> list[StepShape]:
    """Return every shape of a step.

    Decodes come in powers of two. Prompt chunks run alone or, up to ``max_mixed_tokens``, with all decodes. They
    dominate the time of a step, so there are shapes between their powers of two as well.

    Decode-only shapes are repeated with ``decode_steps`` tokens per launch if that is above 1, and with ``drafts`` if
    there are any.
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
    """Return the shapes of a draft model that proposes ``count`` tokens.

    It prefills prompts, computes tokens that it has not seen as drafts, and decodes the remaining drafts in one launch.
    """
    repeats = max(count - 1, 1)
    shapes = step_shapes(max_batch_size, max_prefill_tokens, 0, table_length, repeats, count + 1)
    return [
        shape
        for shape in shapes
        if shape.drafts or (shape.repeats == repeats and not shape.prefill_tokens) or not shape.decodes
    ]


def prompt_output_shapes(shapes: list[StepShape]) -> list[StepShape]:
    """Return the few of ``shapes`` that steps with prompt outputs use, to keep compile times short."""
    prefills = [shape for shape in shapes if shape.prefill_tokens]
    max_decodes = max(shape.decodes for shape in prefills)
    mixed = [shape for shape in prefills if shape.decodes == max_decodes]
    largest = max(prefills, key=lambda shape: shape.prefill_tokens)
    long = max(mixed, key=lambda shape: shape.prefill_tokens)
    short = min(mixed, key=lambda shape: abs(shape.prefill_tokens - long.prefill_tokens // 8))
    return list(dict.fromkeys((short, long, largest)))


def with_adapters(shapes: list[StepShape]) -> list[StepShape]:
    """Return the same shapes for sequences with adapters."""
    return [replace(shape, adapted=True) for shape in shapes]


def _prompt_sizes(last: int) -> list[int]:
    """Return powers of two of rows, and halfway between where whole rows allow it, up to and including ``last``."""
    powers = _powers(ROW_LENGTH, last)
    between = [(smaller + larger) // 2 for smaller, larger in pairwise(powers)]
    return sorted({*powers, *(tokens for tokens in between if tokens % ROW_LENGTH == 0)})


def _powers(first: int, last: int) -> list[int]:
    """Return ``first`` and its doublings, up to and including ``last``."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes
