"""What one browser says with the model: turns, the reply that is written, and what went wrong. Knows no page."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxdeploy.api.client import REASONS, ServerError
from jaxdeploy.chat.session import ChatReply
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ContextLengthError, JaxdeployError
from jaxdeploy.messages import FinishReason, TextOutput
from jaxdeploy.unicode_text import well_formed

logger = logging.getLogger("jaxdeploy")

REFRESH_SECONDS = 0.05
"""A reply is shown so often while it is written, however fast its tokens come."""


class Model(Protocol):
    """Who answers."""

    def events(
        self, messages: Sequence[Mapping[str, str]], gen_config: GenerationConfig, user: str
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a reply, in OpenAI's form."""
        ...


@dataclass(frozen=True)
class Manner:
    """How to answer: the system prompt, and the settings of the generation."""

    system: str = ""
    gen_config: GenerationConfig = field(default_factory=GenerationConfig)


@dataclass
class Turn:
    """What the user said, and the reply to it."""

    said: str
    reply: ChatReply


@dataclass
class Dialogue:
    """``error`` is what went wrong with the last question, in words; ``unsent`` is that question, if nothing came."""

    turns: list[Turn] = field(default_factory=list)
    error: str = ""
    unsent: str = ""
    user: str = ""
    """Who this is to the server, which shares itself out fairly between users."""
    _writing: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a reply is being written."""
        return self._writing is not None and not self._writing.done()

    @property
    def figures(self) -> str:
        """How long and how fast the last reply is."""
        last = self.turns[-1].reply if self.turns else ChatReply()
        if last.num_tokens:
            return last.figures()
        return "waiting for the first token" if self.busy else ""

    async def ask(self, model: Model, said: str, manner: Manner) -> AsyncGenerator[None]:
        """Say something; yields whenever there is more of the reply to show. To close it stops the reply."""
        await self.stop()
        self.error = self.unsent = ""
        self.user = self.user or secrets.token_hex(8)
        said = well_formed(said)
        most = manner.gen_config.max_new_tokens
        turn = Turn(said, ChatReply(max_new_tokens=most))
        events = model.events(self._messages(said, manner), manner.gen_config, self.user)
        self.turns.append(turn)
        writing = self._writing = asyncio.create_task(self._write(turn, events))
        try:
            while not writing.done():
                yield
                await asyncio.wait({writing}, timeout=REFRESH_SECONDS)
        finally:
            writing.cancel()
        yield

    async def again(self, model: Model, index: int, manner: Manner) -> AsyncGenerator[None]:
        """Have turn ``index`` answered anew; what came after it is forgotten."""
        await self.stop()
        if index < len(self.turns):
            said = self.turns[index].said
            del self.turns[index:]
            async with aclosing(self.ask(model, said, manner)) as steps:
                async for _ in steps:
                    yield

    async def undo(self, index: int) -> str:
        """Take back turn ``index`` and those after it; what the user had said there."""
        await self.stop()
        said = self.turns[index].said if index < len(self.turns) else ""
        del self.turns[index:]
        self.error = ""
        return said

    async def clear(self) -> None:
        """Forget everything."""
        await self.stop()
        self.turns.clear()
        self.error = self.unsent = ""

    async def stop(self) -> None:
        """End the reply that is being written; what there is of it stays."""
        if self._writing is not None and not self._writing.done():
            self._writing.cancel()
            await asyncio.wait({self._writing})

    def _messages(self, said: str, manner: Manner) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": well_formed(manner.system)}] if manner.system.strip() else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.reply.text}]
        return [*messages, {"role": "user", "content": said}]

    async def _write(self, turn: Turn, events: AsyncGenerator[dict[str, Any]]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    add(turn.reply, event)
        except asyncio.CancelledError:
            turn.reply.finish_reason = FinishReason.ABORT
        except JaxdeployError as error:
            self.error = in_words(error)
        except Exception:
            logger.exception("a reply failed")
            self.error = "The web chat failed; its log says more."
        if not turn.reply.num_tokens and (self.error or turn.reply.finish_reason is FinishReason.ABORT):
            self._take_back(turn)

    def _take_back(self, turn: Turn) -> None:
        """A question without any reply goes back to where it was typed."""
        if turn in self.turns:
            self.turns.remove(turn)
            self.unsent = turn.said


def short_name(model: str) -> str:
    """``model`` as the page shows it: of a path the last folder, of anything else the whole."""
    name = well_formed(model).replace("\\", "/").rstrip("/")
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name[1:3] == ":/"
    return (name.rpartition("/")[2] if is_path else name) or model


def add(reply: ChatReply, event: Mapping[str, Any]) -> None:
    """Add a chunk to ``reply``. A chunk counts as a token, until the server tells how many there were."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text, thought = delta.get("content") or "", delta.get("reasoning_content") or delta.get("reasoning") or ""
        ended = choice.get("finish_reason")
        reason = FinishReason(ended) if ended in REASONS else reply.finish_reason
        if text or thought:
            reply.add(TextOutput("", text, (0,), finish_reason=reason))
            reply.text = well_formed(reply.text)
            reply.thought = well_formed(reply.thought + thought)
        reply.finish_reason = reason
    if usage := event.get("usage"):
        reply.num_tokens = usage["completion_tokens"]


def in_words(error: JaxdeployError) -> str:
    """What the user is told of ``error``."""
    if isinstance(error, ContextLengthError):
        return f"This conversation is too long for the model: {error}. Begin a new chat, or take something back."
    status = error.status if isinstance(error, ServerError) else None
    if status in (401, 403):
        return "The server wants an API key that this page does not have; start the web chat with --api-key."
    if status == 429 and isinstance(error, ServerError):
        wait = f"{error.retry_after} s" if error.retry_after else "a moment"
        return f"The server has too much to do just now; try again in {wait}."
    if isinstance(error, ServerError):
        return f"The server failed: {error}."
    return f"{error}."
