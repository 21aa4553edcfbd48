"""The synchronous engine: add requests, call ``step`` until there is no work.

While the device runs one step the host schedules, builds and launches the next: sampled tokens reach it on the device,
and the host reads them one step late.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdeploy.engine.checks import RequestLimits, check_name
from jaxdeploy.engine.device.adapter_reader import AdapterReader
from jaxdeploy.engine.device.buckets import BucketTable, StepShape, prompt_output_shapes, with_adapters
from jaxdeploy.engine.device.inputs import StepFields
from jaxdeploy.engine.device.packing import (
    PackedBatch,
    choose_bucket,
    for_adapters,
    pack,
    prompt_outputs_of,
    settings_of,
)
from jaxdeploy.engine.device.prompt_reading import PromptReader
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.sampler import NOT_FINITE
from jaxdeploy.engine.device.step import StepResult
from jaxdeploy.engine.failure import failure
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.batch import Chunk, ScheduledBatch
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.spans import Spans
from jaxdeploy.engine.speculation.speculation import Speculation
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import ConfigError, NonFiniteError, RequestError, UnknownAdapterError
from jaxdeploy.grammar.matcher import Grammars, Matcher
from jaxdeploy.messages import NO_SPECULATION, FinishReason, Request, StepOutput, TokenLogprob

logger = logging.getLogger("jaxdeploy")

GRAMMAR_THREADS = 4
"""Grammars that are compiled at the same time, without the GIL: a large one does not delay a small one."""

_NOT_FINITE = (
    "the model computed logits that are NaN or infinite; check the weights and the adapter, or choose a dtype with a "
    "larger range"
)

PATIENCE = 0.005
"""Seconds that a step waits for a grammar where there is nothing else to do."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HostSample:
    """``Sampled`` on the host, every array with the tokens in a row as another first dimension."""

    tokens: Array
    logprobs: Array | None
    top_tokens: Array | None
    top_logprobs: Array | None


@dataclass(frozen=True)
class Flight:
    """A step that has been launched: what it samples, and behind which chunk in which row.

    ``drafting``: guesses were asked for, whether or not there were any.
    """

    result: StepResult
    packed: PackedBatch
    drafting: bool


class Engine:
    """Runs sequences through scheduler and model. One thread calls it; it holds no text, only tokens.

    ``spans`` names the parts of a step: schedule, admit, build, dispatch; then, of the step before, wait and commit.
    ``weight_bytes`` of weights are read in every one. ``grammars`` makes what requests with a grammar follow,
    ``speculation`` guesses ahead, ``reader`` reads adapters.

    A fault in work for one sequence ends that sequence alone. A fault in the work of a whole step ends all sequences of
    the step, if the device still has its arrays; if not, ``step`` raises.
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
        self.scheduler = scheduler
        self.spans = Spans()
        self.weight_bytes = runner.weight_bytes
        self._runner = runner
        self._shapes = shapes
        self._prompt_output_shapes = prompt_output_shapes(shapes)
        self._buckets = BucketTable(shapes)
        self._prompt_output_buckets = BucketTable(self._prompt_output_shapes)
        self.limits = RequestLimits(scheduler.limits.session_len, vocab_size)
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[StepOutput] = []
        """Outputs of sequences that a fault has ended since ``step`` returned."""
        self._flight: Flight | None = None
        self._taken_in: float | None = None
        self._deadlines: list[tuple[float, str]] = []
        self._steps = 0
        self._grammars, self._reader = grammars, reader
        self._loaded: deque[tuple[str, Any]] = deque()
        self._speculation = speculation
        self._readers: dict[Sequence, PromptReader] = {}
        self._compiler = ThreadPoolExecutor(1, "jaxdeploy-compiler")
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, "jaxdeploy-grammar")
        self._compiling: dict[Sequence, Future[Matcher | None]] = {}
        self._loader = ThreadPoolExecutor(1, "jaxdeploy-loader")

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.scheduler.has_work or bool(self._compiling)

    @property
    def stats(self) -> EngineStats:
        """How it stands."""
        scheduler = self.scheduler
        blocks, prefixes = scheduler.blocks, scheduler.prefixes
        return EngineStats(
            waiting=scheduler.waiting + len(self._compiling),
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
        adapted = [] if self._reader is None else with_adapters(self._shapes)
        self._runner.warm_up(self._shapes + adapted, progress)
        if self._speculation is not None:
            self._speculation.warm_up(progress)
        if self.scheduler.prefixes.host.num_blocks:
            self._weigh_host_memory()

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextLengthError: the prompt leaves no room for a token in ``session_len``.
            RequestError: an empty prompt, a token outside the vocabulary, too many logprobs, or a name in use.
            UnknownAdapterError: an adapter that is not loaded.
        """
        check_name(request, request.request_id in self._sequences)
        self.limits.check(request)
        if request.sampling.grammar is not None and self._grammars is None:
            raise RequestError("grammar is not there: the engine has no tokenizer; leave it out")
        sequence = Sequence(request)
        settings_of(sequence)  # laid out here, where a value that does not fit costs this request only
        if request.adapter is not None:
            sequence.adapter = self._adapters.named(request.adapter)
        reader = PromptReader(sequence) if sequence.prompt_outputs else None
        if request.sampling.grammar is None and reader is None:
            self.scheduler.add(sequence)
        else:
            threads = self._grammar_threads if reader is None else self._compiler
            self._compiling[sequence] = threads.submit(self._compile, sequence)
        self._sequences[request.request_id] = sequence
        if reader is not None:
            self._readers[sequence] = reader
        if request.timeout is not None:
            sequence.deadline = time.monotonic() + request.timeout
            heapq.heappush(self._deadlines, (sequence.deadline, request.request_id))

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; one that has ended, or never was, is no error."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        self._readers.pop(sequence, None)
        if (compiling := self._compiling.pop(sequence, None)) is not None:
            compiling.cancel()
            return
        if self._flight is not None:  # what it writes has not been looked at
            self.scheduler.blocks.suspect(block.index for block in sequence.placement.blocks)
        self.scheduler.abort(sequence)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that requests may ask for."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """Read a LoRA adapter in PEFT's layout in a thread; once that is done requests may ask for it.

        Raises, in the future:
            CheckpointError: the adapter is damaged or does not fit. ConfigError: there is no room for adapters.
        """

        def read() -> None:
            if self._reader is None:
                raise ConfigError(f"adapter={name!r} cannot be loaded: there is no room; start with max_loras=8")
            self._loaded.append((name, self._reader.read(folder)))

        return self._loader.submit(read)

    def unload_adapter(self, name: str) -> Future[None]:
        """Refuse requests for an adapter from now on; those that are there end as usual.

        Raises ``UnknownAdapterError``, in the future.
        """
        answer: Future[None] = Future()
        try:
            self._adapters.unload(name)
        except UnknownAdapterError as error:
            answer.set_exception(error)
        else:
            answer.set_result(None)
        return answer

    def step(self) -> list[StepOutput]:
        """Launch a step, then take in what the one before sampled: the new token of every sequence that got one."""
        outputs = self._give_up()
        self._take_compiled()
        drafter = self._drafter()
        if drafter is not None or self._must_see_tokens():
            outputs += self._take_in()
        launched = self._launch(drafter)
        self._fail_scheduled()
        outputs += self._take_in()
        self._flight = launched
        if launched is None:
            self._taken_in = None
        failed, self._failed = self._failed, []
        return outputs + failed

    def wake(self) -> None:
        """Nothing to do: ``step`` computes, it does not wait for others."""

    def close(self) -> None:
        """Give the device memory back."""
        self._flight = None
        for pool in (self._compiler, self._grammar_threads, self._loader):
            pool.shutdown(wait=False, cancel_futures=True)
        self._runner.close()
        if self._speculation is not None:
            self._speculation.close()

    @property
    def _adapters(self) -> Adapters:
        """Those that are loaded, with what threads have read since."""
        while self._loaded:
            self.scheduler.adapters.load(*self._loaded.popleft())
        return self.scheduler.adapters

    def _weigh_host_memory(self) -> None:
        """Do without it where a block is computed again in less time than it takes to bring it back."""
        largest = max(self._shapes, key=lambda shape: (shape.prefill_tokens, -shape.decodes))
        again = self._runner.seconds_to_compute(largest) * self.scheduler.limits.block_size
        back = self._runner.seconds_to_restore()
        logger.info(
            "a KV block comes back from host memory in %.3f ms, and is computed in %.3f ms", 1e3 * back, 1e3 * again
        )
        if back > again:
            logger.warning("num_cpu_blocks: host memory is not used, evicted blocks are computed again faster")
            self.scheduler.prefixes.host.close()

    def _compile(self, sequence: Sequence) -> Matcher | None:
        """What must be there before ``sequence`` can run; in a thread, others go on meanwhile."""
        if sequence.prompt_outputs:
            adapted = [] if self._reader is None else with_adapters(self._prompt_output_shapes)
            self._runner.prepare(self._prompt_output_shapes + adapted, sequence.prompt_outputs)
        grammar = sequence.sampling.grammar
        if grammar is None:
            return None
        assert self._grammars is not None, "checked when it was added"
        return self._grammars.matcher(grammar)

    def _take_compiled(self) -> None:
        """Queue sequences for which everything is compiled; those whose grammar turns out to be none end."""
        if self._compiling and not self.scheduler.has_work:
            wait(self._compiling.values(), PATIENCE, FIRST_COMPLETED)
        for sequence in [sequence for sequence, matcher in self._compiling.items() if matcher.done()]:
            try:
                sequence.matcher = self._compiling.pop(sequence).result()
                self.scheduler.add(sequence)
            except Exception as error:  # whatever is wrong with a grammar is its sequence's alone
                sequence.finish_reason = FinishReason.ERROR  # the scheduler has not taken it
                self._fail(sequence, error)

    def _give_up(self) -> list[StepOutput]:
        """Abort what is not complete in its time."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            deadline, name = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(name)
            if sequence is not None and sequence.deadline == deadline:  # else it is another of that name
                self.abort(name)
                outputs.append(StepOutput(name, (), FinishReason.ABORT, cached_tokens=sequence.placement.cached_tokens))
        return outputs

    def _must_see_tokens(self) -> bool:
        """Whether a sequence's next token depends on one in flight in a way that only the host can tell."""
        return self._flight is not None and any(chunk.sequence.needs_host_sync for _, chunk in self._flight.packed.rows)

    def _drafter(self) -> Speculation | None:
        """Who is to guess in the next step, if it should be tried."""
        speculation = self._speculation
        return speculation if speculation is not None and speculation.wanted(self.scheduler.decoding) else None

    def _launch(self, drafter: Speculation | None) -> Flight | None:
        """Schedule, build and start a step; ``None`` when nothing can run."""
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
                self._write_tokens(batch.admitted)
            return self._start(batch, drafting=drafter is not None)
        except Exception as error:
            if not copied or not self._runner.intact:
                raise
            self._fail_batch(batch, error)
            return None

    def _start(self, batch: ScheduledBatch, *, drafting: bool) -> Flight:
        """Build and launch ``batch``."""
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

    def _write_tokens(self, admitted: Iterable[Sequence]) -> None:
        for sequence in admitted:
            assert sequence.placement.slot is not None, "an admitted sequence has a slot"
            self._runner.write_tokens(sequence.placement.slot, sequence.token_ids)

    def _fail(self, sequence: Sequence, error: Exception, trusted: int | None = None) -> None:
        """End a sequence with an error. ``trusted`` as in ``Scheduler.fail``."""
        name = sequence.request_id
        if self._sequences.get(name) is sequence:
            del self._sequences[name]
        self._readers.pop(sequence, None)
        if sequence.finish_reason is None:
            self.scheduler.fail(sequence, trusted)
        reason = failure(name, error)
        self._failed.append(
            StepOutput(name, (), FinishReason.ERROR, cached_tokens=sequence.placement.cached_tokens, error=reason)
        )

    def _fail_batch(self, batch: ScheduledBatch, error: Exception) -> None:
        """End the sequences of a step that was not launched. Nobody may find what it was to compute."""
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

    def _take_in(self) -> list[StepOutput]:
        """Wait for the step in flight and commit what it sampled; sequences that have ended since are left out."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        with self.spans("wait"):
            sampled = _to_host(flight)
        with self.spans("commit"):
            if (sampled.tokens == NOT_FINITE).any():
                self._fail_not_finite(flight, sampled.tokens)
            self.scheduler.blocks.trust()
            self._take_readings(flight)
            tokens = sampled.tokens.T.tolist()
            rows: list[tuple[int, Sequence, int]] = []
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
                    rows.append((row, sequence, len(sequence.token_ids)))
            self.scheduler.commit(new)
            self._time(flight, sum(map(len, new.values())))
            return self._outputs(rows, sampled)

    def _outputs(self, rows: list[tuple[int, Sequence, int]], sampled: HostSample) -> list[StepOutput]:
        """What each sequence got, in ``row``, behind the tokens that were known of it."""
        outputs = []
        for row, sequence, known in rows:
            try:
                outputs.append(self._output(row, sequence, known, sampled))
            except Exception as error:  # the other sequences continue
                self._fail(sequence, error)
        return outputs

    def _fail_not_finite(self, flight: Flight, tokens: Array) -> None:
        """End sequences whose logits are not finite, and have their blocks cleared before others use them.

        A sequence that has ended meanwhile may have left such values too. One that ended here has no blocks left.
        """
        shape, batch = flight.packed.inputs.shape, flight.packed.batch
        width, decodes = shape.decode_length, shape.decodes
        places = [
            *((width * index, index, chunk) for index, chunk in enumerate(batch.decodes)),
            *((width * decodes + index, decodes + index, chunk) for index, chunk in enumerate(batch.chunks)),
        ]
        tables = StepFields.of(flight.packed.inputs.packed, shape).block_tables
        for row, index, chunk in places:
            mine, sequence = tokens[:, row : row + 1 + len(chunk.drafts)], chunk.sequence
            if sequence.finish_reason is FinishReason.ERROR or not (mine == NOT_FINITE).any():
                continue
            held = tables[index, : self.scheduler.limits.blocks_for(chunk.end)].tolist()
            self.scheduler.distrust(sequence, held)
            if sequence.finish_reason is None:
                self._fail(sequence, NonFiniteError(_NOT_FINITE), trusted=0)

    def _accepted(self, chunk: Chunk, tokens: list[list[int]], row: int) -> list[int]:
        """The new tokens of a sequence: those sampled in its row, or as many behind its drafts as hold."""
        if not chunk.drafts:
            return tokens[row]
        assert self._speculation is not None, "nobody else drafts"
        behind = [token for (token,) in tokens[row : row + 1 + len(chunk.drafts)]]
        return self._speculation.accept(chunk.sequence, chunk.drafts, behind)

    def _time(self, flight: Flight, tokens: int) -> None:
        """Tell how long a step of decodes took: the time since the one before was taken in."""
        before, self._taken_in = self._taken_in, time.monotonic()
        batch = flight.packed.batch
        if self._speculation is not None and before is not None and tokens and not batch.chunks:
            seconds = self._taken_in - before
            self._speculation.gate.note(len(batch.decodes), drafted=flight.drafting, seconds=seconds, tokens=tokens)

    def _take_readings(self, flight: Flight) -> None:
        for place in flight.packed.prompts:
            sequence = place.chunk.sequence
            reader = self._readers.get(sequence)
            if reader is None or flight.result.prompts is None:
                continue
            try:
                reader.add(place, flight.result.prompts)
            except Exception as error:  # the other sequences continue
                self._fail(sequence, error)

    def _output(self, row: int, sequence: Sequence, known: int, sampled: HostSample) -> StepOutput:
        tokens = tuple(sequence.token_ids[known:])
        logprobs: tuple[TokenLogprob, ...] = ()
        if (wanted := sequence.sampling.logprobs) is not None:
            places = ((0, row + index) if len(sampled.tokens) == 1 else (index, row) for index in range(len(tokens)))
            logprobs = tuple(_logprob(token, sampled, *at, wanted) for token, at in zip(tokens, places, strict=True))
        prompt = None
        if sequence.prompt_outputs:
            sequence.prompt_outputs = PromptOutputs.NONE
            prompt = self._readers.pop(sequence).reading()
        if sequence.finish_reason is not None:
            del self._sequences[sequence.request_id]
        reason, cached, guesses = sequence.finish_reason, sequence.placement.cached_tokens, sequence.draft.counts
        error = None if sequence.fault is None else failure(sequence.request_id, sequence.fault)
        return StepOutput(sequence.request_id, tokens, reason, logprobs, cached, prompt, guesses, error)


def _to_host(flight: Flight) -> HostSample:
    def fetch(array: jax.Array | None) -> Array | None:
        if array is None:
            return None
        return np.asarray(array) if flight.packed.batch.repeats > 1 else np.asarray(array)[None]

    tokens = fetch(flight.result.sampled.tokens)
    assert tokens is not None, "every step samples"
    rest = (fetch(array) for array in flight.result.sampled[1:])
    return HostSample(tokens, *rest)


def _logprob(token: int, sampled: HostSample, index: int, row: int, wanted: int) -> TokenLogprob:
    assert sampled.logprobs is not None, "a sequence that wants log-probabilities selects the full sampler"
    assert sampled.top_tokens is not None, "the full sampler reports the likeliest tokens"
    assert sampled.top_logprobs is not None, "the full sampler reports the likeliest tokens"
    ids = sampled.top_tokens[index, row, :wanted].tolist()
    values = sampled.top_logprobs[index, row, :wanted].tolist()
    return TokenLogprob(token, float(sampled.logprobs[index, row]), tuple(zip(ids, values, strict=True)))
