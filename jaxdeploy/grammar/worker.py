"""A process that compiles untrusted grammars: a crash, or too much time or memory, ends this process and no other.

Jobs arrive on stdin and answers leave on stdout. Both are JSON, preceded by the length in bytes (4 bytes, big-endian).
A job is a ``response_format``. The answer is ``{"grammar": ...}``, in llguidance's form, or ``{"fault": ...}``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.process import HEADER, MEMORY, STACK
from jaxdeploy.grammar.response_format import check, grammar_text

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def main() -> None:
    """Answer jobs until stdin is closed. The argument is the CPU time that a job may take, in seconds."""
    seconds = float(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the library must not get between answers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, answers, seconds))
    thread.start()
    thread.join()


def _serve(jobs: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    vocabulary = _byte_vocabulary()
    while header := jobs.read(HEADER.size):
        job = json.loads(jobs.read(*HEADER.unpack(header)))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        answer = json.dumps(_answer(job, vocabulary)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(HEADER.pack(len(answer)) + answer)
        answers.flush()


def _answer(response_format: Any, vocabulary: LLTokenizer) -> dict[str, str | None]:
    try:
        grammar = grammar_text(response_format)
        if grammar is not None:
            check(grammar, response_format)
            _compile(grammar, vocabulary)
    except RequestError as error:
        return {"fault": str(error)}
    return {"grammar": grammar}


def _compile(grammar: str, vocabulary: LLTokenizer) -> None:
    """Compile ``grammar`` as the engine will. Raises ``RequestError`` if the library refuses."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        fault = next(iter(matcher.get_error().splitlines()), "no reason given")
        raise RequestError(f"response_format cannot be followed ({fault}); simplify it")


class _Bytes:
    """A vocabulary of all bytes. Compiling takes as long as with a model's vocabulary."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _byte_vocabulary() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=[256])


if __name__ == "__main__":
    main()
