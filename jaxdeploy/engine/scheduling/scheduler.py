"""Chooses what runs in the next step: decodes first, then chunks of prompts, within one token budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefill import PrefillPlan
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.running import RunningSequences, rank
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.scheduling.sessions import Sessions
from jaxdeploy.engine.scheduling.waiting import PROMPT_COST, REPLY_COST, WaitingQueue
from jaxdeploy.messages import FinishReason

MAX_PARTIAL = 4
"""Maximum prompts that are partly computed. More would hold blocks without use; fewer let long prompts delay others."""


class Drafter(Protocol):
    """Proposes draft tokens."""

    def max_drafts(self, sequence: Sequence) -> int:
        """Return the number of tokens to reserve room for when drafts of a sequence are made."""
        ...

    def propose(self, room: Mapping[Sequence, int]) -> Mapping[Sequence, tuple[int, ...]]:
        """Return drafts that follow the tokens of each sequence, no more than there is room for."""
        ...


class Scheduler:
    """Holds waiting and running sequences and their blocks.

    The scheduler runs ahead: a step may be scheduled before the tokens of the previous one are known, as long as the
    device runs them in order. If a sequence turns out to have ended, its results of that step are dropped.
    """

    def __init__(
        self, blocks: BlockManager, prefixes: PrefixCache, limits: SchedulerLimits, adapters: Adapters | None = None
    ) -> None:
        self.blocks = blocks
        self.prefixes = prefixes
        self.limits = limits
        self.adapters = adapters or Adapters()
        """A sequence runs only while its adapter has a slot of these."""
        self.preemptions = 0
        self.generated = 0
        self.faults: dict[Sequence, Exception] = {}
        """Sequences whose own work raised in ``schedule``. Their scheduled chunks must run; then call ``fail``."""
        self._waiting = WaitingQueue()
        self._running = RunningSequences(limits.max_batch_size, self.adapters)
        self._sessions = Sessions(blocks.num_blocks)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Number of sequences that have no slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of sequences that have a slot."""
        return len(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences that run and have completed their prefill."""
        return self._running.decoding

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.max_len = min(sequence.max_len, self.limits.session_len)
        if self.prefixes.serves(sequence):
            self._sessions.resume(sequence)
        self._waiting.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence, waiting or running, and free its blocks."""
        sequence.finish_reason = FinishReason.ABORT
        self._drop(sequence)

    def fail(self, sequence: Sequence, trusted: int | None = None) -> None:
        """Drop a sequence that a fault has ended, waiting or running, and free its blocks.

        The prefix cache keeps its first ``trusted`` blocks; ``None``: all that it knows.
        """
        sequence.finish_reason = FinishReason.ERROR
        placement = sequence.placement
        if placement.slot is None:
            self._waiting.remove(sequence)
            return
        self._running.stop(sequence)
        kept = len(placement.cached_nodes)
        if trusted is not None:
            kept = min(trusted, kept)
        self.prefixes.forget(block.index for block in placement.blocks[kept:])
        self._give_back(sequence, kept)

    def distrust(self, sequence: Sequence, indices: Iterable[int] = ()) -> None:
        """Keep others from using what a sequence computed, and the blocks ``indices``, until they are cleared."""
        placement = sequence.placement
        held = [block.index for block in placement.blocks if self.blocks.is_valid(block)]
        cached = [node.block.index for node in placement.cached_nodes if node.block is not None]
        tainted = {*held, *cached, *indices}
        self.prefixes.forget(tainted, placement.cached_nodes)
        self.blocks.taint(tainted)

    def schedule(self, drafter: Drafter | None = None) -> ScheduledBatch:
        """Return the next step, which must run. Blocks for all of its tokens are allocated.

        Tokens that it samples are in flight until ``commit``. ``drafter`` is asked for drafts unless the step computes
        prompts; no token may be in flight then. Sequences that had to give up their blocks wait again.
        """
        ready = self._ready()
        repeats = self._decode_steps(ready)
        decodes = self._decodes(self._reserve(ready, repeats), repeats)
        budget = self.limits.max_prefill_tokens
        if decodes:
            budget = min(budget, self.limits.max_mixed_tokens - len(decodes))
        rows = max(budget // self.limits.row_length, 1)
        chunks, admitted = self._prefill(rows * self.limits.row_length)
        if drafter is not None and not chunks and repeats == 1:
            decodes = self._with_drafts(decodes, drafter)
        return ScheduledBatch(decodes, chunks, admitted, repeats)

    def commit(self, tokens: Mapping[Sequence, Iterable[int]]) -> None:
        """Append the tokens that the oldest step in flight sampled. Sequences that end give back slot and blocks.

        Tokens after a sequence's end are dropped. A fault in the work for a sequence ends it.
        """
        for sequence, new in tokens.items():
            try:
                self._append(sequence, new)
            except Exception as error:  # a grammar's matcher may raise anything
                sequence.fault = error
                sequence.finish_reason = FinishReason.ERROR
            sequence.resolve_drafts()
            if sequence.finish_reason is not None:
                self._drop(sequence)

    def _append(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        for token in tokens:
            if sequence.finish_reason is None:
                sequence.append(token)
                self.generated += 1
                self._waiting.charge(sequence, REPLY_COST)

    def _ready(self) -> list[Sequence]:
        """Return the sequences that decode, except those that end by length with the tokens in flight.

        They are in the order in which they keep their blocks.
        """
        return sorted((sequence for sequence in self.decoding if sequence.length < sequence.max_len), key=rank)

    def _decode_steps(self, ready: list[Sequence]) -> int:
        """Return the tokens that each of ``ready`` decodes in this step: ``decode_steps`` if nothing prevents it."""
        count = self.limits.decode_steps
        if count == 1 or self._waiting or self._running.prefilling:
            return 1
        missing = sum(max(self._missing_blocks(sequence, count), 0) for sequence in ready)
        if missing > self.blocks.available:
            return 1
        return count if all(_decodes_freely(sequence, count) for sequence in ready) else 1

    def _reserve(self, decodes: Iterable[Sequence], count: int) -> list[Sequence]:
        """Allocate blocks for ``count`` more tokens of each sequence. Returns those that still run.

        If there are too few blocks, the lowest sequences are preempted, which may be among ``decodes``.
        """
        reserved = []
        for sequence in decodes:
            try:
                if sequence.placement.slot is not None and self._make_room(sequence, count):
                    reserved.append(sequence)
            except Exception as error:  # the other sequences continue
                self.faults[sequence] = error
        return reserved

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Allocate blocks for ``count`` more tokens. Returns ``False`` if the sequence itself was preempted."""
        missing = self._missing_blocks(sequence, count)
        while missing > self.blocks.available:
            lowest = self._running.lowest
            self._preempt(lowest)
            if lowest is sequence:
                return False
        if missing > 0:
            sequence.placement.add_blocks(self.blocks.allocate(missing))
        return True

    def _missing_blocks(self, sequence: Sequence, count: int) -> int:
        """Return the blocks that a sequence lacks to compute ``count`` tokens, from its last known token."""
        return self.limits.blocks_for(sequence.length + count - 1) - len(sequence.placement.blocks)

    def _decodes(self, sequences: Iterable[Sequence], count: int) -> tuple[Chunk, ...]:
        chunks = []
        for sequence in sequences:
            try:
                chunks.append(self._decode(sequence, count))
            except Exception as error:  # the other sequences continue
                self.faults[sequence] = error
        return tuple(chunks)

    def _decode(self, sequence: Sequence, count: int) -> Chunk:
        """Schedule the last token of a sequence and the ``count`` - 1 that follow from it."""
        chunk = Chunk(sequence, sequence.placement.computed, count)
        sequence.placement.computed = chunk.end
        sequence.in_flight += count
        self._add_to_cache(sequence)
        return chunk

    def _with_drafts(self, decodes: tuple[Chunk, ...], drafter: Drafter) -> tuple[Chunk, ...]:
        """Return ``decodes`` with drafts. They take free and cached blocks only: no sequence is preempted."""
        room = {}
        for chunk in decodes:
            sequence, placement = chunk.sequence, chunk.sequence.placement
            reachable = (len(placement.blocks) + self.blocks.available) * self.limits.block_size - placement.computed
            count = min(drafter.max_drafts(sequence), sequence.max_len - sequence.length, reachable)
            if count > 0:
                missing = self.limits.blocks_for(placement.computed + count) - len(placement.blocks)
                placement.add_blocks(self.blocks.allocate(max(missing, 0)))
                room[sequence] = count
        drafts = drafter.propose(room) if room else {}
        return tuple(_verified(chunk, drafts.get(chunk.sequence, ())) for chunk in decodes)

    def _prefill(self, budget: int) -> tuple[tuple[Chunk, ...], tuple[Sequence, ...]]:
        """Return chunks of prompts, and the sequences among them that got their slot."""
        plan = PrefillPlan(budget, self.limits.row_length, self._advance)
        running = self._running.prefilling
        plan.give_half(running)
        plan.complete(running)
        admitted = []
        while plan.left > 0 and self._may_admit():
            sequence = self._waiting.first()
            if not self._try_to_admit(sequence):
                break
            admitted.append(sequence)
            plan.give(sequence, plan.left)
        for sequence in running:
            plan.give(sequence, plan.left)
        # A sequence may have got tokens more than once: they follow each other and make up one chunk.
        chunks = (Chunk(item, item.placement.computed - tokens, tokens) for item, tokens in plan.tokens.items())
        return tuple(chunks), tuple(admitted)

    def _advance(self, sequence: Sequence, max_tokens: int) -> int:
        if sequence in self.faults:
            return 0
        try:
            return self._chunk(sequence, max_tokens)
        except Exception as error:  # the other sequences continue
            self.faults[sequence] = error
            return 0

    def _chunk(self, sequence: Sequence, max_tokens: int) -> int:
        """Schedule the next tokens of a prompt, which count as computed from now on. Returns how many."""
        placement = sequence.placement
        tokens = min(max_tokens, sequence.length - placement.computed)
        placement.computed += tokens
        if not sequence.prefilling:
            sequence.in_flight += 1
        self._add_to_cache(sequence)
        return tokens

    def _may_admit(self) -> bool:
        return bool(self._waiting and self._running.free_slots and len(self._running.prefilling) < MAX_PARTIAL)

    def _try_to_admit(self, sequence: Sequence) -> bool:
        try:
            return self._admit(sequence)
        except Exception as error:  # the sequence waits until ``fail`` removes it
            self.faults[sequence] = error
            return False

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot, and blocks for all of its known tokens. Returns whether it got them.

        Cached blocks are reused: its own from an earlier run or turn, or those that the prefix cache finds, whichever
        cover more tokens. A prompt with outputs is computed from its start. A preempted sequence first waits for its
        token in flight.
        """
        if sequence.in_flight or not self.adapters.has_room(sequence.adapter):
            return False
        placement = sequence.placement
        own, found = [], []
        if not sequence.prompt_outputs:
            found = self.prefixes.find(sequence)
            own = self.blocks.hold(placement.blocks)  # the sequence holds those that are still valid
        computed = min(placement.computed, len(own) * self.limits.block_size)
        if len(found) > len(own):
            # The found blocks replace its own, which go back to the cache.
            self.blocks.retire(own)
            own = []
            held = self.blocks.hold([node.block for node in found if node.block is not None])
            computed = len(found) * self.limits.block_size
        else:
            found = []
            held = own
        missing = self.limits.blocks_for(len(sequence.token_ids)) - len(held)
        if missing > self.blocks.available:
            self.blocks.retire(held)
            return False
        # From here on the sequence owns what is held, blocks restored from host memory, and new blocks.
        placement.clear_blocks()
        placement.add_blocks(own + self.prefixes.bring(found, missing))
        self._begin(sequence, computed)
        self._waiting.remove(sequence)
        self._running.start(sequence)
        return True

    def _begin(self, sequence: Sequence, computed: int) -> None:
        """Set a sequence up to prefill all known tokens after the first ``computed``; at least one is left."""
        placement = sequence.placement
        first_run = not placement.prefill_end
        placement.prefill_end = len(sequence.token_ids)
        placement.computed = min(computed, placement.prefill_end - 1)
        placement.cached_nodes = []
        sequence.draft.computed = 0
        if first_run:
            placement.cached_tokens = placement.computed
            self.prefixes.asked += sequence.prompt_length
            self.prefixes.found += placement.cached_tokens
            self._waiting.charge(sequence, PROMPT_COST * sequence.prompt_length)

    def _add_to_cache(self, sequence: Sequence) -> int:
        """Let others find the computed blocks of a sequence whose tokens are known. Returns how many they find."""
        placement = sequence.placement
        full = min(placement.computed, len(sequence.token_ids)) // self.limits.block_size
        if full > len(placement.cached_nodes) and self.prefixes.serves(sequence):
            try:
                self.prefixes.add(sequence, full)
            except Exception as error:  # the chunk is complete and runs, so its entries in the cache are valid
                self.faults[sequence] = error
        return len(placement.cached_nodes)

    def _preempt(self, sequence: Sequence) -> None:
        """Return a sequence to the head of its queue. Its blocks stay cached until others need them."""
        self.preemptions += 1
        self._running.stop(sequence)
        self.blocks.retire(sequence.placement.blocks)  # the sequence keeps references and no longer holds them
        self._waiting.put_back(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended. Blocks in which others may find its tokens stay cached."""
        if sequence.placement.slot is None:  # it waits, and has given its blocks back
            self._waiting.remove(sequence)
            return
        self._running.stop(sequence)
        kept = self._add_to_cache(sequence)
        try:
            if self.prefixes.serves(sequence) and self._sessions.leave(sequence):
                kept = len(sequence.placement.blocks)
        except Exception as error:  # its blocks are given back all the same
            self.faults[sequence] = error
        self._give_back(sequence, kept)

    def _give_back(self, sequence: Sequence, kept: int) -> None:
        """Give back all blocks of a sequence. The content of the first ``kept`` stays cached."""
        placement = sequence.placement
        self.blocks.release(placement.blocks[kept:])
        self.blocks.retire(placement.blocks[:kept])
        placement.clear_blocks()


def _decodes_freely(sequence: Sequence, count: int) -> bool:
    """Return whether the next ``count`` tokens need nothing from the host and do not pass the maximum length."""
    return (
        sequence.length + count <= sequence.max_len
        and sequence.generated >= sequence.sampling.min_new_tokens
        and not sequence.needs_host_sync
    )


def _verified(decode: Chunk, drafts: tuple[int, ...]) -> Chunk:
    """Return a decode that also verifies ``drafts``, and count their tokens as computed and in flight."""
    if not drafts:
        return decode
    sequence = decode.sequence
    sequence.placement.computed += len(drafts)
    sequence.in_flight += len(drafts)
    sequence.draft.unverified = True
    return Chunk(sequence, decode.start, decode.length + len(drafts), drafts)
