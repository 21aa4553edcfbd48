"""What runs in the next step: decodes first, then chunks of prompts in one token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.scheduling.sessions import Sessions
from jaxdeploy.engine.scheduling.waiting import PROMPT_COST, REPLY_COST, WaitingQueue
from jaxdeploy.messages import FinishReason

MOST_PARTIAL = 4
"""Prompts that may be half computed at a time: more hold blocks to little use, fewer let long ones block the way."""


@dataclass(frozen=True)
class Chunk:
    """``length`` tokens of a sequence, from position ``start`` on; the last may be ``drafts`` to be verified."""

    sequence: Sequence
    start: int
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Where the last token goes that is sampled, if any is."""
        return self.start + self.length

    @property
    def first_new(self) -> int:
        """Where the first one goes: of a prompt there is but one, decodes in a row and drafts have one behind each."""
        return self.start + 1 if self.drafts or self.start >= self.sequence.prefill_end else self.end

    @property
    def verifies(self) -> bool:
        """Whether its drafts are guesses, so that what is sampled behind each counts, and not only behind the last."""
        return bool(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether it completes the prefill, or lies behind it, so that a token can be sampled."""
        return self.end >= self.sequence.prefill_end


@dataclass(frozen=True)
class ScheduledBatch:
    """One step: sequences that decode, chunks of prompts, and sequences that just got their slot.

    Each of the first decodes ``repeats`` tokens.
    """

    decodes: tuple[Chunk, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    repeats: int = 1

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def max_drafts(self) -> int:
        """Most drafts of any sequence."""
        return max([len(chunk.drafts) for chunk in self.decodes], default=0)


class Drafter(Protocol):
    """Who guesses how sequences go on."""

    def most(self, sequence: Sequence) -> int:
        """Tokens to have room for when drafts of a sequence are made."""
        ...

    def propose(self, room: Mapping[Sequence, int]) -> Mapping[Sequence, tuple[int, ...]]:
        """Drafts behind the tokens of each sequence, at most as many as there is room for."""
        ...


class Scheduler:
    """Holds waiting and running sequences and their blocks.

    It runs ahead: a step may be scheduled before the tokens of the one before are known, as long as the device runs
    them in order. What such a step computes for a sequence that turns out to have ended is dropped.

    Prompts begin behind what ``prefixes`` finds of them in the cache. A step computes up to ``max_prefill_tokens`` of
    prompts, and beside replies up to ``max_mixed_tokens`` in all, so that those do not stall. ``chunk_multiple``: rows
    of the batch hold that many tokens, so a chunk costs a multiple of it. While nobody waits, a step decodes
    ``decode_steps`` tokens in a row. A sequence runs only while its adapter has one of the slots of ``adapters``.

    ``faults``: sequences for which work of their own failed in ``schedule``, with the exception. Their chunks that are
    in the batch must run. Afterwards the caller ends each with ``fail``.
    """

    def __init__(
        self,
        blocks: BlockManager,
        prefixes: PrefixCache,
        *,
        block_size: int,
        max_batch_size: int,
        max_prefill_tokens: int,
        max_mixed_tokens: int,
        chunk_multiple: int,
        session_len: int,
        decode_steps: int = 1,
        adapters: Adapters | None = None,
    ) -> None:
        self.blocks = blocks
        self.prefixes = prefixes
        self.adapters = adapters or Adapters()
        self.block_size = block_size
        self.max_prefill_tokens = max_prefill_tokens
        self.max_mixed_tokens = max_mixed_tokens
        self.chunk_multiple = chunk_multiple
        self.session_len = session_len
        self.decode_steps = decode_steps
        self.preemptions = self.generated = 0
        self.faults: dict[Sequence, Exception] = {}
        self._slots = deque(range(max_batch_size))
        self._waiting = WaitingQueue()
        self._sessions = Sessions(blocks.num_blocks)
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Sequences that have no slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences that run and are behind their prefill."""
        return [sequence for sequence in self._running if not sequence.prefilling]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.longest = min(sequence.longest, self.session_len)
        if self.prefixes.serves(sequence):
            self._sessions.resume(sequence)
        self._waiting.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        sequence.finish_reason = FinishReason.ABORT
        self._drop(sequence)

    def fail(self, sequence: Sequence, trusted: int | None = None) -> None:
        """Forget a sequence that a fault has ended, wherever it is, and free its blocks.

        Others may find its tokens only in its first ``trusted`` blocks; ``None``: in all that were noted.
        """
        sequence.finish_reason = FinishReason.ERROR
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        noted = len(sequence.noted)
        kept = noted if trusted is None else min(trusted, noted)
        self.prefixes.forget(block.index for block in sequence.blocks[kept:])
        self._let_go(sequence, kept)

    def distrust(self, sequence: Sequence, indices: Iterable[int] = ()) -> None:
        """Have nobody use what a sequence has computed, nor the blocks ``indices``, before they are cleared."""
        held = [block.index for block in sequence.blocks if self.blocks.is_valid(block)]
        noted = [node.block.index for node in sequence.noted if node.block is not None]
        every = {*held, *noted, *indices}
        self.prefixes.forget(every, sequence.noted)
        self.blocks.taint(every)

    def schedule(self, drafter: Drafter | None = None) -> ScheduledBatch:
        """The next step, which must run. Blocks for all of its tokens are allocated; those that had to make room wait.

        Tokens that it samples are in flight until ``commit``. ``drafter`` may guess, while no prompt is computed; no
        token may be in flight then.
        """
        ready = self._going_on()
        repeats = self._repeats(ready)
        decodes = self._decodes(self._grow(ready, repeats), repeats)
        room = self.max_prefill_tokens
        if decodes:
            room = min(room, self.max_mixed_tokens - len(decodes))
        rows = max(room // self.chunk_multiple, 1)
        chunks, admitted = self._prefill(rows * self.chunk_multiple)
        if drafter is not None and not chunks and repeats == 1:
            decodes = self._guess(decodes, drafter)
        return ScheduledBatch(decodes, chunks, admitted, repeats)

    def commit(self, tokens: Mapping[Sequence, Iterable[int]]) -> None:
        """Take in what the oldest step in flight has sampled; sequences that end with it give back slot and blocks.

        Tokens behind a sequence's end are dropped. A sequence that meets a fault ends with it.
        """
        for sequence, new in tokens.items():
            try:
                self._append(sequence, new)
            except Exception as error:  # a grammar's matcher may raise anything
                sequence.fault, sequence.finish_reason = error, FinishReason.ERROR
            sequence.settle()
            if sequence.finish_reason is not None:
                self._drop(sequence)

    def _append(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        for token in tokens:
            if sequence.finish_reason is None:
                sequence.append(token)
                self.generated += 1
                self._waiting.charge(sequence, REPLY_COST)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens take up."""
        return -(-tokens // self.block_size)

    def _prefill(self, budget: int) -> tuple[tuple[Chunk, ...], tuple[Sequence, ...]]:
        """Chunks of prompts, and the sequences among them that got their slot.

        Half of the budget goes to who came first. Then come prompts that can be finished, new ones, and with what is
        left those that came first again: so a long prompt neither starves nor stands in the way of short ones.
        """
        chunks: dict[Sequence, Chunk] = {}
        left = budget

        def give(sequence: Sequence, most: int) -> None:
            nonlocal left
            if sequence.prefilling and most > 0 and sequence not in self.faults:
                try:
                    chunk = self._chunk(sequence, most)
                except Exception as error:  # the other sequences continue
                    self.faults[sequence] = error
                    return
                left -= self._cost(chunk.length)
                before = chunks.get(sequence)
                chunks[sequence] = (
                    chunk if before is None else Chunk(sequence, before.start, before.length + chunk.length)
                )

        running, admitted = [sequence for sequence in self._running if sequence.prefilling], []
        half = self._cost(budget // 2)
        for sequence in running:
            give(sequence, half - (budget - left))
        for sequence in sorted(running, key=_uncomputed):
            if _uncomputed(sequence) <= left:
                give(sequence, left)
        while left > 0 and self._may_admit() and self._try_to_admit(self._waiting.first()):
            admitted.append(self._running[-1])
            give(admitted[-1], left)
        for sequence in running:
            give(sequence, left)
        return tuple(chunks.values()), tuple(admitted)

    def _may_admit(self) -> bool:
        partial = sum(sequence.prefilling for sequence in self._running)
        return bool(self._waiting and self._slots and partial < MOST_PARTIAL)

    def _going_on(self) -> list[Sequence]:
        """Those that decode, but for those that end by length with what is in flight.

        Those that are to keep their blocks longest come first.
        """
        return sorted((item for item in self.decoding if item.length < item.longest), key=_rank)

    def _repeats(self, ready: list[Sequence]) -> int:
        """Tokens that all of ``ready`` can decode in a row, without anybody waiting for the end of it: some, or one."""
        count = self.decode_steps
        if count == 1 or self._waiting or any(sequence.prefilling for sequence in self._running):
            return 1
        room = sum(max(self._missing(sequence, count), 0) for sequence in ready)
        free = all(
            sequence.length + count <= sequence.longest
            and sequence.generated >= sequence.sampling.min_new_tokens
            and not sequence.reads_tokens
            for sequence in ready
        )
        return count if free and room <= self.blocks.available else 1

    def _grow(self, decodes: Iterable[Sequence], count: int) -> list[Sequence]:
        """Give decoding sequences room for ``count`` tokens, in turn; the last of all are preempted for it."""
        grown = []
        for sequence in decodes:
            try:
                if sequence.slot is not None and self._make_room(sequence, count):
                    grown.append(sequence)
            except Exception as error:  # the other sequences continue
                self.faults[sequence] = error
        return grown

    def _decodes(self, sequences: Iterable[Sequence], count: int) -> tuple[Chunk, ...]:
        chunks = []
        for sequence in sequences:
            try:
                chunks.append(self._decode(sequence, count))
            except Exception as error:  # the other sequences continue
                self.faults[sequence] = error
        return tuple(chunks)

    def _missing(self, sequence: Sequence, count: int) -> int:
        """Blocks that a sequence needs to compute ``count`` tokens in a row, the last that it has the first of them."""
        return self.blocks_for(sequence.length + count - 1) - len(sequence.blocks)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        missing = self._missing(sequence, count)
        while missing > self.blocks.available:
            last = max(self._running, key=_rank)
            self._preempt(last)
            if last is sequence:
                return False
        if missing > 0:
            sequence.hold(self.blocks.allocate(missing))
        return True

    def _try_to_admit(self, sequence: Sequence) -> bool:
        try:
            return self._admit(sequence)
        except Exception as error:  # it waits on until ``fail`` takes it out
            self.faults[sequence] = error
            return False

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence slot and blocks for all its tokens, keeping what is still cached of them.

        One that was preempted while a token of its was in flight waits for it, and one whose adapter finds every slot
        in use for the end of another. A prompt that is to be read is computed from its start.
        """
        if sequence.in_flight or not self.adapters.has_room(sequence.adapter):
            return False
        kept = [] if sequence.prompt_outputs else sequence.blocks
        found = [] if sequence.prompt_outputs else self.prefixes.find(sequence)
        own = self.blocks.hold(kept)
        computed = min(sequence.computed, len(own) * self.block_size)
        if len(found) > len(own):
            self.blocks.retire(own)
            own, computed = [], len(found) * self.block_size
        else:
            found = []
        held = own or self.blocks.hold([node.block for node in found if node.block is not None])
        missing = self.blocks_for(len(sequence.token_ids)) - len(held)
        if missing > self.blocks.available:
            self.blocks.retire(held)
            return False
        sequence.hold_none()
        sequence.hold(own + self.prefixes.bring(found, missing))
        first_time, sequence.prefill_end = not sequence.prefill_end, len(sequence.token_ids)
        sequence.computed = min(computed, sequence.prefill_end - 1)
        sequence.noted = []
        sequence.drafted = 0
        if first_time:
            sequence.cached = sequence.computed
            self.prefixes.asked += sequence.prompt_length
            self.prefixes.found += sequence.cached
            self._waiting.charge(sequence, PROMPT_COST * sequence.prompt_length)
        sequence.slot = self._slots.popleft()
        self.adapters.hold(sequence.adapter)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next tokens of a sequence, ``budget`` at most: from now on they count as computed."""
        chunk = Chunk(sequence, sequence.computed, min(budget, sequence.length - sequence.computed))
        sequence.computed = chunk.end
        sequence.in_flight += chunk.samples
        self._note(sequence)
        return chunk

    def _decode(self, sequence: Sequence, count: int) -> Chunk:
        """The last token of a sequence, and those that follow from it."""
        chunk = Chunk(sequence, sequence.computed, count)
        sequence.computed = chunk.end
        sequence.in_flight += count
        self._note(sequence)
        return chunk

    def _guess(self, decodes: tuple[Chunk, ...], drafter: Drafter) -> tuple[Chunk, ...]:
        """``decodes`` with drafts, as far as there are blocks that nobody holds."""
        room = {}
        for chunk in decodes:
            sequence = chunk.sequence
            most = min(drafter.most(sequence), sequence.longest - sequence.length)
            most = min(most, (len(sequence.blocks) + self.blocks.available) * self.block_size - sequence.computed)
            if most > 0:
                missing = self.blocks_for(sequence.computed + most) - len(sequence.blocks)
                sequence.hold(self.blocks.allocate(max(missing, 0)))
                room[sequence] = most
        drafts = drafter.propose(room) if room else {}
        return tuple(self._verify(chunk, drafts.get(chunk.sequence, ())) for chunk in decodes)

    def _verify(self, decode: Chunk, drafts: tuple[int, ...]) -> Chunk:
        """A decode that also tries ``drafts``."""
        if not drafts:
            return decode
        sequence = decode.sequence
        sequence.computed += len(drafts)
        sequence.in_flight += len(drafts)
        sequence.unsure = True
        return Chunk(sequence, decode.start, decode.length + len(drafts), drafts)

    def _note(self, sequence: Sequence) -> int:
        """Let others find what is computed of a sequence, as far as its tokens are known. Returns blocks found so."""
        full = min(sequence.computed, len(sequence.token_ids)) // self.block_size
        if full > len(sequence.noted) and self.prefixes.serves(sequence):
            try:
                self.prefixes.note(sequence, full)
            except Exception as error:  # its chunk is complete and runs, so that what is noted holds
                self.faults[sequence] = error
        return len(sequence.noted)

    def _cost(self, tokens: int) -> int:
        return -(-tokens // self.chunk_multiple) * self.chunk_multiple

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of its queue; its blocks stay cached until others need them, the rest is recomputed."""
        self.preemptions += 1
        self._running.remove(sequence)
        self.blocks.retire(sequence.blocks)
        self._free_slot(sequence)
        self._waiting.put_back(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended; blocks by which others may find its tokens stay cached."""
        if sequence.slot is None:  # it waits, and has given its blocks back
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        shared = self._note(sequence)
        remembered = False
        try:
            remembered = self.prefixes.serves(sequence) and self._sessions.leave(sequence)
        except Exception as error:  # its blocks are given back all the same
            self.faults[sequence] = error
        self._let_go(sequence, len(sequence.blocks) if remembered else shared)

    def _let_go(self, sequence: Sequence, kept: int) -> None:
        """Give back slot and blocks; the content of the first ``kept`` stays."""
        self.blocks.release(sequence.blocks[kept:])
        self.blocks.retire(sequence.blocks[:kept])
        sequence.hold_none()
        self._free_slot(sequence)

    def _free_slot(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "only running sequences have a slot to give back"
        self._slots.append(sequence.slot)
        self.adapters.release(sequence.adapter)
        sequence.slot = None


def _uncomputed(sequence: Sequence) -> int:
    """Tokens that its prefill still has to compute."""
    return sequence.prefill_end - sequence.computed


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Who keeps its blocks when there are too few: the most urgent, then who came first."""
    return sequence.request.priority, sequence.arrival
