"""Requests on their way to the scheduler: checked, named, and held back until what they need is compiled."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from jaxdeploy.engine.checks import RequestLimits, check_name
from jaxdeploy.engine.device.settings import settings_of
from jaxdeploy.engine.front.adapter_loader import AdapterLoader
from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.matcher import Grammars, Matcher
from jaxdeploy.messages import Request

GRAMMAR_THREADS = 4
"""Grammars that are compiled at the same time, without the GIL, so that a large one does not delay a small one."""

COMPILE_TIMEOUT = 0.005
"""Seconds that a step waits for a compilation if it has nothing else to do."""


class Intake:
    """The requests of an engine by name, and those that are not ready to be scheduled."""

    def __init__(
        self,
        limits: RequestLimits,
        loader: AdapterLoader,
        grammars: Grammars | None,
        compile_steps: Callable[[PromptOutputs], None],
    ) -> None:
        """Create an intake.

        Args:
            limits: what requests are checked against.
            loader: finds the adapters that requests name.
            grammars: makes matchers; ``None`` without a tokenizer.
            compile_steps: compiles the steps that return prompt outputs. It runs in a thread.
        """
        self.sequences: dict[str, Sequence] = {}
        """Sequences that have not ended, by the name of their request."""
        self.compiling: dict[Sequence, Future[Matcher | None]] = {}
        """Sequences that wait for a grammar or for programs. The scheduler does not have them."""
        self._limits = limits
        self._loader = loader
        self._grammars = grammars
        self._compile_steps = compile_steps
        self._deadlines: list[tuple[float, str]] = []
        self._step_thread = ThreadPoolExecutor(1, "jaxdeploy-compiler")
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, "jaxdeploy-grammar")

    def check(self, request: Request) -> Sequence:
        """Return a sequence for a request, which ``add`` takes next.

        Raises:
            ContextLengthError: the prompt leaves no room for a token in ``session_len``.
            RequestError: an empty prompt, a token outside the vocabulary, too many logprobs, or a name in use.
            UnknownAdapterError: an adapter that is not loaded.
        """
        check_name(request, request.request_id in self.sequences)
        self._limits.check(request)
        if request.sampling.grammar is not None and self._grammars is None:
            raise RequestError("grammar is not there: the engine has no tokenizer; leave it out")
        sequence = Sequence(request)
        settings_of(sequence)  # made here, where a value that does not fit fails this request only
        if request.adapter is not None:
            sequence.adapter = self._loader.adapters.named(request.adapter)
        return sequence

    def add(self, sequence: Sequence, queue: Callable[[Sequence], None]) -> None:
        """Register a sequence, and ``queue`` it unless something must be compiled for it first."""
        if sequence.sampling.grammar is None and not sequence.prompt_outputs:
            queue(sequence)
        else:
            threads = self._step_thread if sequence.prompt_outputs else self._grammar_threads
            self.compiling[sequence] = threads.submit(self._compile, sequence)
        self.sequences[sequence.request_id] = sequence
        timeout = sequence.request.timeout
        if timeout is not None:
            sequence.deadline = time.monotonic() + timeout
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.request_id))

    def forget(self, sequence: Sequence) -> None:
        """Free the name of a sequence that ends."""
        if self.sequences.get(sequence.request_id) is sequence:  # otherwise a new sequence has the name
            del self.sequences[sequence.request_id]

    def cancel(self, sequence: Sequence) -> bool:
        """Stop compiling for a sequence. Returns whether it was compiling, so that the scheduler does not have it."""
        compiling = self.compiling.pop(sequence, None)
        if compiling is None:
            return False
        compiling.cancel()
        return True

    def expired(self) -> list[Sequence]:
        """Return the sequences whose time is over, once."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            deadline, name = heapq.heappop(self._deadlines)
            sequence = self.sequences.get(name)
            if sequence is not None and sequence.deadline == deadline:  # otherwise a new sequence has the name
                expired.append(sequence)
        return expired

    def compiled(self, *, block: bool) -> list[tuple[Sequence, Future[Matcher | None]]]:
        """Return sequences for which everything is compiled or has failed, and the result.

        With ``block``, wait up to ``COMPILE_TIMEOUT`` for one.
        """
        if block and self.compiling:
            wait(self.compiling.values(), COMPILE_TIMEOUT, FIRST_COMPLETED)
        done = [(sequence, future) for sequence, future in self.compiling.items() if future.done()]
        for sequence, _ in done:
            del self.compiling[sequence]
        return done

    def close(self) -> None:
        """Stop the threads after their current work."""
        for threads in (self._step_thread, self._grammar_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, sequence: Sequence) -> Matcher | None:
        """Compile what ``sequence`` needs before it runs. This runs in a thread; other sequences continue."""
        if sequence.prompt_outputs:
            self._compile_steps(sequence.prompt_outputs)
        grammar = sequence.sampling.grammar
        if grammar is None:
            return None
        assert self._grammars is not None, "checked when the request was added"
        return self._grammars.matcher(grammar)
