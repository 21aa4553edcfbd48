"""A conversation in the terminal: its messages, one reply as it streams, and the speed of the reply."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from jaxdeploy.api.prompts import Prompt
from jaxdeploy.api.response import Response, Session
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import RequestError
from jaxdeploy.files.atomic import check_replaceable, is_json, put_text
from jaxdeploy.files.stored import user_path
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import FinishReason, TextOutput

if TYPE_CHECKING:
    from jaxdeploy.api.pipeline import Pipeline


class Speaker(Protocol):
    """A model to talk with: a ``Pipeline``, or the client of a server."""

    @property
    def session_len(self) -> int | None:
        """Maximum tokens of prompt and reply; ``None`` if it is not known."""
        ...

    def session(self) -> Session:
        """A new conversation."""
        ...

    def stream_infer(self, prompts: Prompt, gen_config: GenerationConfig, *, session_id: int) -> Iterator[Response]:
        """The reply as it comes."""
        ...

    def stop_session(self, session: Session) -> None:
        """End the reply that runs; may be called from a signal handler."""
        ...


@dataclass(frozen=True)
class WithAdapter:
    """A ``pipe`` that answers with its LoRA adapter ``name``."""

    pipe: Pipeline
    name: str

    @property
    def session_len(self) -> int:
        """Longest prompt plus reply, in tokens."""
        return self.pipe.session_len

    def session(self) -> Session:
        """A new conversation."""
        return self.pipe.session()

    def stream_infer(self, prompts: Prompt, gen_config: GenerationConfig, *, session_id: int) -> Iterator[Response]:
        """The reply as it comes."""
        return self.pipe.stream_infer(prompts, gen_config, session_id=session_id, adapter_name=self.name)

    def stop_session(self, session: Session) -> None:
        """End the reply that runs; may be called from a signal handler."""
        self.pipe.stop_session(session)


@dataclass
class Conversation:
    """The messages so far. If ``remembers`` is false, each prompt is independent, like a text to complete."""

    system: str | None = None
    remembers: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> Prompt:
        """What the model is given when the user says ``text``."""
        if not self.remembers:
            return text
        begin = [{"role": "system", "content": self.system}] if self.system else []
        return [*begin, *self.messages, {"role": "user", "content": text}]

    def remember(self, text: str, reply: str) -> None:
        """Add a turn."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def save(self, path: str) -> None:
        """Write the conversation as a JSON list of messages. Raises ``RequestError``."""
        begin = [{"role": "system", "content": self.system}] if self.system else []
        text = json.dumps([*begin, *self.messages], ensure_ascii=False, indent=2) + "\n"
        file = user_path(path)
        try:
            check_replaceable(file, is_json(list))
            put_text(file, text)
        except (OSError, ValueError) as error:  # ValueError: the file system does not take the name
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"path={path!r} cannot be written ({reason}); name another file") from None


@dataclass
class ChatReply(Reply):
    """A reply with the figures that the terminal shows.

    thought: the reasoning, separate from the text.
    max_new_tokens: limit that was asked for.
    full: whether the session reached ``session_len``; ``None``: unknown.
    """

    thought: str = ""
    max_new_tokens: int | None = None
    full: bool | None = None

    @property
    def limit(self) -> str:
        """The setting that cut the reply off."""
        if self.full:
            return "session_len"
        if self.full is False or self.num_tokens >= (self.max_new_tokens or sys.maxsize):
            return "max_new_tokens"
        return "max_new_tokens or session_len"

    def summary(self) -> str:
        """Return the figures in brackets."""
        return f"[{self.figures()}]"

    def figures(self) -> str:
        """Return tokens, time to the first token, tokens per second after it, and why the reply was cut off."""
        parts = [f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}"]
        if self.time_to_first_token is not None:
            parts.append(f"TTFT {self.time_to_first_token:.2f} s")
        if self.time_per_token:
            parts.append(f"{1 / self.time_per_token:.1f} tok/s")
        if self.finish_reason is FinishReason.ABORT:
            parts.append("stopped")
        if self.finish_reason is FinishReason.LENGTH:
            parts.append(f"cut off at {self.limit}")
        return " · ".join(parts)


def stream_reply(pipe: Speaker, prompt: Prompt, gen_config: GenerationConfig, write: Callable[[str], Any]) -> ChatReply:
    """Generate a reply and ``write`` each piece at once. Ctrl-C ends it; the text so far is kept.

    Raises:
        RequestError: the prompt cannot be served, e.g. ``ContextLengthError``.
        JaxdeployError: the reply ended with an error.
    """
    session = pipe.session()
    reply = ChatReply(max_new_tokens=gen_config.max_new_tokens)
    with _stopping_on_interrupt(pipe, session):
        for piece in pipe.stream_infer(prompt, gen_config, session_id=session.session_id):
            reply.add(_output_of(piece))
            write(piece.text)
            if pipe.session_len is not None:
                reply.full = piece.input_token_len + piece.generate_token_len >= pipe.session_len
            if piece.error is not None:
                raise piece.error
    return reply


def _output_of(piece: Response) -> TextOutput:
    return TextOutput("", piece.text, tuple(piece.token_ids), finish_reason=piece.finish_reason, error=piece.error)


@contextmanager
def _stopping_on_interrupt(pipe: Speaker, session: Session) -> Iterator[None]:
    """The first Ctrl-C ends the reply after the step that runs; the second one raises ``KeyboardInterrupt``.

    An exception in the middle of a step would leave the engine with buffers that it has given away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pipe.stop_session(session)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
