"""Drafts of a smaller model, which samples with the settings and the noise of the large one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxdeploy.engine.device.buckets import ROW_LENGTH, BucketTable, StepShape
from jaxdeploy.engine.device.packing import choose_bucket, pack
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.sequence import Sequence

Array = np.ndarray[Any, Any]


class DraftProposer:
    """Makes drafts with a second model. Its pools have the same number of blocks and use the same block tables.

    ``Sequence.draft.computed`` tokens are computed. Tokens that it has not seen, of a prompt or decoded without drafts,
    are computed in chunks first, from token ``first`` on. Tokens accepted since the last call are then verified like
    drafts, in one step that samples the first draft. The other drafts follow in one launch.
    """

    def __init__(
        self, runner: ModelRunner, shapes: list[StepShape], vocab_size: int, count: int, first: int = 0
    ) -> None:
        self._runner = runner
        self._shapes = shapes
        self._buckets = BucketTable(shapes)
        self._vocab_size = vocab_size
        self._count = count
        self._first = first
        self._max_prefill = max(shape.prefill_tokens for shape in shapes)

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """See ``Proposer``."""
        room = {sequence: most for sequence, most in room.items() if len(sequence.token_ids) > self._first + 1}
        if not room:
            return {}
        self._catch_up(list(room))
        first = self._draft_first(list(room))
        longer = [sequence for sequence, most in room.items() if most >= self._count - 1 > 0]
        others = self._draft_others(longer) if longer else {}
        return {sequence: (first[sequence], *others.get(sequence, ()))[:most] for sequence, most in room.items()}

    def warm_up(self, progress: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Compile everything that can run."""
        self._runner.warm_up(self._shapes, progress)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Overwrite the content of KV blocks with zeros."""
        self._runner.clear_blocks(blocks)

    def close(self) -> None:
        """Give the device memory back."""
        self._runner.close()

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Compute all but the last token of sequences whose new tokens do not fit in one row."""
        late = [
            item
            for item in sequences
            if not item.draft.computed or len(item.token_ids) - item.draft.computed > self._count + 1
        ]
        for sequence in late:
            assert sequence.placement.slot is not None, "a sequence that decodes has a slot"
            self._runner.write_tokens(sequence.placement.slot, sequence.token_ids)
            sequence.draft.computed = max(sequence.draft.computed, self._first)
        while late:
            chunks, left = [], self._max_prefill
            for sequence in late:
                length = min(len(sequence.token_ids) - 1 - sequence.draft.computed, left)
                if length > 0:
                    chunks.append(Chunk(sequence, sequence.draft.computed, length))
                    sequence.draft.computed += length
                    left -= -(-length // ROW_LENGTH) * ROW_LENGTH
            self._run(ScheduledBatch(chunks=tuple(chunks), samples=False))
            late = [sequence for sequence in late if sequence.draft.computed < len(sequence.token_ids) - 1]

    def _draft_first(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """Compute tokens that are new to the model, and sample the next one."""
        rows = [
            Chunk(
                item,
                item.draft.computed - 1,
                1 + len(item.token_ids) - item.draft.computed,
                tuple(item.token_ids[item.draft.computed :]),
            )
            for item in sequences
        ]
        tokens, places = self._run(ScheduledBatch(decodes=tuple(rows)))
        for sequence in sequences:
            sequence.draft.computed = len(sequence.token_ids)
        return {row.sequence: int(tokens[0, places[row.sequence] + len(row.drafts)]) for row in rows}

    def _draft_others(self, sequences: list[Sequence]) -> dict[Sequence, tuple[int, ...]]:
        steps = self._count - 1
        rows = tuple(Chunk(sequence, len(sequence.token_ids), steps) for sequence in sequences)
        tokens, places = self._run(ScheduledBatch(decodes=rows, repeats=steps))
        return {sequence: tuple(tokens[:, places[sequence]].tolist()) for sequence in sequences}

    def _run(self, batch: ScheduledBatch) -> tuple[Array, dict[Sequence, int]]:
        """The tokens of a step, [repeats, samples], and where each sequence has its first."""
        packed = pack(choose_bucket(self._buckets, batch), batch, self._vocab_size, constrain=False)
        sampled = np.asarray(self._runner.run(packed.inputs).sampled.tokens)
        return np.atleast_2d(sampled), {chunk.sequence: row for row, chunk in packed.rows}
