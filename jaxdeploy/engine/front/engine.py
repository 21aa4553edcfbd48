"""The synchronous engine: add requests, then call ``step`` until there is no work.

The device runs one step while the host schedules, packs and launches the next. Sampled tokens stay on the device, where
the next step reads them. The host reads them one step late.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.device.adapter_reader import AdapterReader
from jaxdeploy.engine.device.buckets import BucketTable, StepShape, prompt_output_shapes, with_adapters
from jaxdeploy.engine.device.packing import (
    PackedBatch,
    choose_bucket,
    for_adapters,
    not_finite,
    pack,
    prompt_outputs_of,
)
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.sampler import NOT_FINITE
from jaxdeploy.engine.device.step import StepResult
from jaxdeploy.engine.front.adapter_loader import AdapterLoader
from jaxdeploy.engine.front.host_memory import restoring_pays
from jaxdeploy.engine.front.intake import Intake
from jaxdeploy.engine.front.outputs import Array, HostSample, NewTokens, ended_output, step_output
from jaxdeploy.engine.front.prompt_collector import PromptCollectors
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.spans import Spans
from jaxdeploy.engine.speculation.speculation import Speculation
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import NonFiniteError
from jaxdeploy.grammar.matcher import Grammars
from jaxdeploy.messages import NO_SPECULATION, FinishReason, Request, StepOutput

logger = logging.getLogger("jaxdeploy")

_NOT_FINITE = (
    "the model computed logits that are NaN or infinite; check the weights and the adapter, or choose a dtype with a "
    "larger range"
)


@dataclass(frozen=True)
class Flight:
    """A step that has been launched and whose results the host has not read."""

    result: StepResult
    """Arrays on the device."""
    packed: PackedBatch
    """The batch, and the rows of its chunks."""
    drafting: bool
    """Whether drafts were asked for, even if there were none."""


class Engine:
    """Runs sequences through scheduler and model. One thread calls it. It knows tokens, not text.

    A fault in work for one sequence ends that sequence alone. A fault in the work of a whole step ends all sequences of
    the step, if the device still has its arrays; otherwise ``step`` raises.

    Attributes:
        scheduler: the waiting and running sequences.
        limits: what requests are checked against.
        spans: times the parts of a step: schedule, admit, build, dispatch; then, of the step before, wait and commit.
        weight_bytes: bytes of weights that every step reads.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        shapes: list[StepShape],
        vocab_size: int,
        grammars: Grammars | None = None,
        speculation: Speculation | None = None,
        reader: AdapterReader | None = None,
    ) -> None:
        """Create an engine.

        Args:
            scheduler: one without sequences. Its limits must keep every batch within ``shapes``.
            runner: runs steps; the engine closes it.
            shapes: the shapes of all steps.
            vocab_size: V; token ids are below it.
            grammars: makes the matchers of requests with a grammar; ``None`` without a tokenizer.
            speculation: proposes drafts; ``None`` for none.
            reader: reads adapters; ``None`` if sequences cannot have any.
        """
        self.scheduler = scheduler
        self.limits = RequestLimits(scheduler.limits.session_len, vocab_size)
        self.spans = Spans()
        self.weight_bytes = runner.weight_bytes
        self._runner = runner
        self._shapes = shapes
        self._prompt_output_shapes = prompt_output_shapes(shapes)
        self._buckets = BucketTable(shapes)
        self._prompt_output_buckets = BucketTable(self._prompt_output_shapes)
        self._speculation = speculation
        self._loader = AdapterLoader(scheduler.adapters, reader)
        self._intake = Intake(self.limits, self._loader, grammars, self._compile_prompt_outputs)
        self._collectors = PromptCollectors()
        self._failed: list[StepOutput] = []
        """Outputs of sequences that a fault has ended since ``step`` returned."""
        self._flight: Flight | None = None
        self._collected_at: float | None = None
        """When the results of the previous step were read; ``None`` after an idle step."""
        self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.scheduler.has_work or bool(self._intake.compiling)

    @property
    def stats(self) -> EngineStats:
        """Current state and counters."""
        scheduler = self.scheduler
        blocks, prefixes = scheduler.blocks, scheduler.prefixes
        return EngineStats(
            waiting=scheduler.waiting + len(self._intake.compiling),
            running=scheduler.running,
            blocks=blocks.num_blocks,
            active_blocks=blocks.active,
            cached_blocks=blocks.cached,
            host_blocks=prefixes.host.num_blocks,
            used_host_blocks=prefixes.host.used,
            prompt_tokens=prefixes.asked,
            cached_tokens=prefixes.found,
            restored_blocks=prefixes.restored,
            generated_tokens=scheduler.generated,
            steps=self._steps,
            preemptions=scheduler.preemptions,
            speculation=self._speculation.counts if self._speculation else NO_SPECULATION,
            adapters=self.adapters,
        )

    def warm_up(self, progress: Callable[[list[Any]], Iterable[Any]] = iter) -> None:
        """Compile everything that can run; ``progress`` wraps the list of steps, to show a bar."""
        adapted = with_adapters(self._shapes) if self._loader.has_slots else []
        self._runner.warm_up(self._shapes + adapted, progress)
        if self._speculation is not None:
            self._speculation.warm_up(progress)
        host = self.scheduler.prefixes.host
        if host.num_blocks and not restoring_pays(self._runner, self._shapes, self.scheduler.limits.block_size):
            host.close()

    def add(self, request: Request) -> None:
        """Queue a request. Raises the errors of ``Intake.check``."""
        sequence = self._intake.check(request)
        self._collectors.start(sequence)
        try:
            self._intake.add(sequence, self.scheduler.add)
        except Exception:
            self._collectors.drop(sequence)
            raise

    def abort(self, request_id: str) -> None:
        """Drop a request and free its resources. It is no error if the request has ended or never existed."""
        sequence = self._intake.sequences.pop(request_id, None)
        if sequence is None:
            return
        self._collectors.drop(sequence)
        if self._intake.cancel(sequence):
            return
        if self._flight is not None:  # the step in flight may write values into its blocks that are not finite
            self.scheduler.blocks.suspect(block.index for block in sequence.placement.blocks)
        self.scheduler.abort(sequence)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may name."""
        return self._loader.adapters.names

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """Read a LoRA adapter in a thread. See ``AdapterLoader.load``."""
        return self._loader.load(name, folder)

    def unload_adapter(self, name: str) -> Future[None]:
        """Refuse new requests for an adapter. Current ones end as usual. See ``AdapterLoader.unload``."""
        return self._loader.unload(name)

    def step(self) -> list[StepOutput]:
        """Launch a step, then collect the results of the previous one: an output per sequence that got tokens."""
        outputs = self._expire()
        self._queue_compiled()
        drafter = self._drafter()
        if drafter is not None or self._needs_host_sync():
            outputs += self._collect()
        launched = self._launch(drafter)
        self._fail_scheduled()
        outputs += self._collect()
        self._flight = launched
        if launched is None:
            self._collected_at = None
        outputs += self._failed
        self._failed = []
        return outputs

    def wake(self) -> None:
        """Do nothing: ``step`` never blocks on other threads."""

    def close(self) -> None:
        """Free the device memory."""
        self._flight = None
        self._intake.close()
        self._loader.close()
        self._runner.close()
        if self._speculation is not None:
            self._speculation.close()

    def _compile_prompt_outputs(self, outputs: PromptOutputs) -> None:
        """Compile the steps that return prompt outputs. Runs in a thread."""
        adapted = with_adapters(self._prompt_output_shapes) if self._loader.has_slots else []
        self._runner.prepare(self._prompt_output_shapes + adapted, outputs)

    def _expire(self) -> list[StepOutput]:
        """Abort the sequences whose time is over."""
        outputs = []
        for sequence in self._intake.expired():
            self.abort(sequence.request_id)
            outputs.append(ended_output(sequence, FinishReason.ABORT))
        return outputs

    def _queue_compiled(self) -> None:
        """Queue sequences for which everything is compiled. A grammar that is invalid ends its sequence."""
        for sequence, compiled in self._intake.compiled(block=not self.scheduler.has_work):
            try:
                sequence.matcher = compiled.result()
                self.scheduler.add(sequence)
            except Exception as error:  # whatever is wrong with a grammar concerns its sequence alone
                sequence.finish_reason = FinishReason.ERROR  # the scheduler does not have it
                self._fail(sequence, error)

    def _needs_host_sync(self) -> bool:
        """Whether a sequence's next token depends on a token in flight in a way that only the host can resolve."""
        return self._flight is not None and any(chunk.sequence.needs_host_sync for _, chunk in self._flight.packed.rows)

    def _drafter(self) -> Speculation | None:
        """Return the speculation if the next step should have drafts."""
        speculation = self._speculation
        return speculation if speculation and speculation.should_draft(self.scheduler.decoding) else None

    def _launch(self, drafter: Speculation | None) -> Flight | None:
        """Schedule, pack and launch a step; ``None`` if nothing can run."""
        with self.spans("schedule"):
            batch = self.scheduler.schedule(drafter)
        if not batch:
            return None
        self._steps += 1
        copied = False
        try:
            with self.spans("admit"):
                self._copy()
                copied = True
                for sequence in batch.admitted:
                    slot = sequence.placement.slot
                    assert slot is not None, "an admitted sequence has a slot"
                    self._runner.write_tokens(slot, sequence.token_ids)
            return self._start(batch, drafting=drafter is not None)
        except Exception as error:
            # Copies that did not run leave blocks without their content, and a deleted pool has none.
            if not copied or not self._runner.intact:
                raise
            self._fail_batch(batch, error)
            return None

    def _start(self, batch: ScheduledBatch, *, drafting: bool) -> Flight:
        """Pack and launch ``batch``."""
        with self.spans("build"):
            buckets = self._prompt_output_buckets if prompt_outputs_of(batch) else self._buckets
            shape, batch = for_adapters(choose_bucket(buckets, batch), batch)
            packed = pack(shape, batch, self.limits.vocab_size)
        with self.spans("dispatch"):
            result = self._runner.run(packed.inputs)
        for sequence, error in packed.faults:
            self._fail(sequence, error)
        return Flight(result, packed, drafting)

    def _copy(self) -> None:
        """Launch what blocks and adapter slots need before the next step."""
        if unclean := self.scheduler.blocks.unclean():
            self._runner.clear_blocks(unclean)
            if self._speculation is not None:
                self._speculation.clear_blocks(unclean)
        self._runner.copy_blocks(self.scheduler.prefixes.transfers())
        self._runner.upload(self.scheduler.adapters.uploads())

    def _collect(self) -> list[StepOutput]:
        """Wait for the step in flight and commit what it sampled. Sequences that ended meanwhile are left out."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        with self.spans("wait"):
            sampled = HostSample.fetch(flight.result.sampled, flight.packed.batch.repeats)
        with self.spans("commit"):
            if (sampled.tokens == NOT_FINITE).any():
                self._fail_not_finite(flight, sampled.tokens)
            self.scheduler.blocks.trust()
            for sequence, error in self._collectors.add(flight.packed.prompts, flight.result.prompts):
                self._fail(sequence, error)
            tokens = sampled.tokens.T.tolist()
            places: list[NewTokens] = []
            new: dict[Sequence, list[int]] = {}
            for row, chunk in flight.packed.rows:
                sequence = chunk.sequence
                if sequence.finish_reason is not None:
                    continue
                try:
                    new[sequence] = self._accepted(chunk, tokens, row)
                except Exception as error:  # the other sequences continue
                    self._fail(sequence, error)
                else:
                    places.append(NewTokens(sequence, row, len(sequence.token_ids)))
            self.scheduler.commit(new)
            self._record_time(flight, sum(map(len, new.values())))
            return self._outputs(places, sampled)

    def _accepted(self, chunk: Chunk, tokens: list[list[int]], row: int) -> list[int]:
        """Return the new tokens of a sequence: those of its row, or those up to the first wrong draft."""
        if not chunk.drafts:
            return tokens[row]
        assert self._speculation is not None, "only speculation makes drafts"
        sampled = [token for (token,) in tokens[row : row + 1 + len(chunk.drafts)]]
        return self._speculation.accept(chunk.sequence, chunk.drafts, sampled)

    def _record_time(self, flight: Flight, tokens: int) -> None:
        """Report to the gate how long a step of decodes took: the time since the previous one was collected."""
        before, self._collected_at = self._collected_at, time.monotonic()
        batch = flight.packed.batch
        if self._speculation is not None and before is not None and tokens and not batch.chunks:
            seconds = self._collected_at - before
            self._speculation.gate.record(len(batch.decodes), drafted=flight.drafting, seconds=seconds, tokens=tokens)

    def _outputs(self, places: list[NewTokens], sampled: HostSample) -> list[StepOutput]:
        outputs = []
        for new in places:
            sequence = new.sequence
            try:
                prompt = self._collectors.result(sequence) if sequence.prompt_outputs else None
                outputs.append(step_output(new, sampled, prompt))
            except Exception as error:  # the other sequences continue
                self._fail(sequence, error)
            else:
                if sequence.finish_reason is not None:
                    self._intake.forget(sequence)
        return outputs

    def _fail(self, sequence: Sequence, error: Exception, trusted: int | None = None) -> None:
        """End a sequence with an error. ``trusted`` as in ``Scheduler.fail``."""
        self._intake.forget(sequence)
        self._collectors.drop(sequence)
        if sequence.finish_reason is None:
            self.scheduler.fail(sequence, trusted)
        self._failed.append(ended_output(sequence, FinishReason.ERROR, error))

    def _fail_batch(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the sequences of a step that was not launched. The cache forgets what it was to compute."""
        for chunk in (*batch.decodes, *batch.chunks):
            if chunk.sequence.finish_reason is None:
                self._fail(chunk.sequence, error, trusted=chunk.start // self.scheduler.limits.block_size)

    def _fail_scheduled(self) -> None:
        """End the sequences for which something failed while the step was scheduled."""
        faults = self.scheduler.faults
        while faults:
            sequence, error = faults.popitem()
            if sequence.finish_reason is None:
                self._fail(sequence, error)
            else:
                logger.warning("request %s ended before a fault: %s", sequence.request_id, error)

    def _fail_not_finite(self, flight: Flight, tokens: Array) -> None:
        """End sequences whose logits are not finite, and have their blocks cleared before others use them.

        A sequence that ended meanwhile may have left such values too. It has no blocks any more, so they are read from
        the block tables of the step.
        """
        for chunk, blocks in not_finite(flight.packed, tokens):
            sequence = chunk.sequence
            if sequence.finish_reason is FinishReason.ERROR:
                continue
            self.scheduler.distrust(sequence, blocks[: self.scheduler.limits.blocks_for(chunk.end)])
            if sequence.finish_reason is None:
                self._fail(sequence, NonFiniteError(_NOT_FINITE), trusted=0)
