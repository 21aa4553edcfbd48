"""The model behind the routes: prompts become token ids, token ids become replies; too many of them are turned away."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from jaxdeploy.config import GenerationConfig
from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.engine.front.generator import TextOutput, TextRequest
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import ContextLengthError, JaxdeployError, RequestError
from jaxdeploy.generation.resolved import ResolvedGeneration, resolve
from jaxdeploy.messages import FinishReason, Request
from jaxdeploy.server.adapters import ServedAdapters
from jaxdeploy.server.errors import OverloadedError, UnknownModelError
from jaxdeploy.server.grammars import WorkedGrammars
from jaxdeploy.server.metrics import Metrics
from jaxdeploy.server.parsers import reasoning_form, tool_form
from jaxdeploy.server.sessions import Sessions
from jaxdeploy.server.stored_responses import StoredResponses
from jaxdeploy.server.text_threads import TextThreads
from jaxdeploy.tokenizer import Tokenizer

TAIL = 16
"""Tokens of a prompt's end that a mark is looked for in."""

MOST_COUNTED = 2**20
"""Characters of a text that is only tokenised. One that may be a prompt can be longer."""

MOST_BYTES = 4
"""Bytes of a character in UTF-8."""

REMEMBERED = 64
"""Requests whose durations say how long one that is turned away should wait."""


@dataclass(frozen=True)
class Origin:
    """What a request is beside its prompts: its id in the logs, who shares with whom, what comes first.

    ``adapter`` is the LoRA adapter that it asks for. ``owner`` is the key that it came with, where keys are separated:
    requests of different owners share no cached prompts, and cannot end each other.
    """

    request_id: str
    tenant: str = ""
    priority: int = 0
    session_id: str | None = None
    adapter: str | None = None
    owner: str = ""


@dataclass(frozen=True)
class Prompt:
    """Token ids, and how to go on with them."""

    ids: tuple[int, ...]
    how: ResolvedGeneration
    embed: bool = False
    """Its hidden states are wanted."""


class Pulse:
    """Measures how long an engine with work has run no step. It is asked at any times, rarely or often."""

    def __init__(self) -> None:
        self._steps = -1
        self._busy = False
        self._since = 0.0

    def still_for(self, stats: EngineStats) -> float:
        """Seconds since the first call that found the engine with work and at its present step.

        Work that came after the last call counts from now on: nobody knows when it came.
        """
        now = time.monotonic()
        busy = bool(stats.running or stats.waiting) and not stats.fault
        if stats.steps != self._steps or not (busy and self._busy):
            self._since = now
        self._steps = stats.steps
        self._busy = busy
        return now - self._since


class Served:
    """One loaded model by its ``name``. ``most`` replies at most are generated or wait at the same time.

    ``adapters`` are the LoRA adapters that its engine has, with their folders.
    ``tool_form`` and ``reasoning_form`` are how it writes calls and thoughts (``jaxdeploy.server.parsers``), by the
    names given or as its chat template tells. Raises ``ConfigError`` for names that are unknown.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        name: str,
        most: int,
        *,
        adapters: Mapping[str, str] | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        self.engine = engine
        self.name = name
        self.created = int(time.time())
        self.most = most
        self.held = 0
        """Replies that are generated or wait."""
        self.adapters = ServedAdapters(engine, name, adapters or {})
        self.metrics = Metrics(name)
        self.sessions = Sessions()
        self.responses = StoredResponses()
        self.pulse = Pulse()
        self.grammars = WorkedGrammars()
        self.threads = TextThreads()
        template = engine.generator.template.source
        self.tool_form = tool_form(tool_call_parser, template)
        self.reasoning_form = reasoning_form(reasoning_parser, template)
        self._running: dict[str, tuple[str, list[str]]] = {}
        """A request's id → its owner, and what its replies are called in the engine."""
        self._durations: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def session_len(self) -> int:
        """Most tokens of a prompt and its reply."""
        return self.engine.generator.session_len

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.generator.tokenizer

    def check_model(self, name: str) -> None:
        """Raise ``UnknownModelError`` unless ``name`` is the model's or an adapter's, or empty."""
        if name not in ("", self.name) and name not in self.adapters:
            known = ", ".join(map(repr, (self.name, *self.adapters)))
            raise UnknownModelError(f"model={name!r:.80} is not served here; ask for {known}")

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request names as its model, if it is one. Raises ``UnknownModelError``."""
        self.check_model(model)
        return model if model in self.adapters else None

    def model_of(self, origin: Origin) -> str:
        """Who replies to a request: the model, or an adapter of it."""
        return origin.adapter or self.name

    async def chat_ids(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[int, ...]:
        """Token ids of a conversation. Raises ``RequestError``.

        ``variables`` are ``ChatTemplate.render``'s: tools, how the prompt ends, and those of the template.
        """
        return tuple(await self._fitting_ids(await self._rendered(messages, variables)))

    async def text_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a raw text, with the token that texts begin with.

        Raises ``ContextLengthError`` where they are too many, ``RequestError`` if there are none.
        """
        ids = await self._fitting_ids(text)
        bos = self.tokenizer.bos_token_id
        if not ids and bos is not None:
            ids = [bos]
        if not ids:
            raise RequestError("prompt='' has no tokens, and this model has no token to begin with; write some text")
        return tuple(ids)

    async def count_chat_ids(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation, which may be longer than a prompt. Raises ``RequestError``."""
        text = await self._rendered(messages, variables)
        made = self.engine.generator
        return await self._counted(text, lambda: made.template.encode_text(text, made.tokenizer))

    async def count_text_ids(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of a raw text, which may be longer than a prompt. Raises ``RequestError``."""
        return await self._counted(text, lambda: self.tokenizer.encode(text, add_bos=add_bos))

    async def _rendered(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        render = self.engine.generator.template.render
        return await self.threads.run(lambda: render(messages, **variables))

    async def _fitting_ids(self, text: str) -> list[int]:
        """Token ids of a text. Raises ``ContextLengthError`` before the work where they cannot fit."""
        least = await self._least(text)
        if least >= self.session_len:
            raise ContextLengthError(
                f"prompt of at least {least} tokens must be shorter than session_len={self.session_len}; "
                "shorten it, or start with a larger session_len"
            )
        made = self.engine.generator
        return await self.threads.run(lambda: made.template.encode_text(text, made.tokenizer), len(text))

    async def _counted(self, text: str, encode: Callable[[], list[int]]) -> list[int]:
        if len(text) > MOST_COUNTED and await self._least(text) >= self.session_len:
            raise RequestError(
                f"a text of {len(text)} characters is longer than a prompt and than {MOST_COUNTED} characters; "
                "send it in parts"
            )
        return await self.threads.run(encode, len(text))

    async def _least(self, text: str) -> int:
        """Tokens that ``text`` has at least; 0 where it is short."""
        if MOST_BYTES * len(text) < self.session_len:
            return 0
        return await self.threads.run(lambda: self.tokenizer.least_tokens(text))

    async def ids_of(self, given: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a raw text, or those that are given."""
        return await self.text_ids(given) if isinstance(given, str) else tuple(given)

    def ends_with(self, ids: Sequence[int], mark: str) -> bool:
        """Whether a prompt ends with ``mark``."""
        return self.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False).rstrip().endswith(mark)

    async def resolved(self, ids: tuple[int, ...], config: GenerationConfig, *, chat: bool) -> Prompt:
        """``config`` without gaps, for ``ids``. Raises ``RequestError`` for what the engine would refuse."""
        made = self.engine.generator
        form = config.response_format
        grammar = None if form is None else await self.grammars.of(form)
        how = resolve(
            config,
            made.generation_defaults,
            made.tokenizer,
            eos_token_ids=made.eos_token_ids,
            template_stops=made.template.stop_words if chat else (),
            to_grammar=lambda _: grammar,
        )
        made.engine.limits.check(Request("", ids, how.sampling))
        return Prompt(ids, how)

    async def to_read(self, ids: tuple[int, ...]) -> Prompt:
        """A prompt of which nothing is wanted but its hidden states. Raises ``RequestError``."""
        prompt = await self.resolved(ids, GenerationConfig(do_sample=False, max_new_tokens=1), chat=False)
        return replace(prompt, embed=True)

    def check_room(self, prompts: Sequence[Prompt]) -> None:
        """Raise ``OverloadedError`` if replies to all ``prompts`` are too many now, ``RequestError`` if always."""
        wanted = _count(prompts)
        self.check_number(wanted)
        if self.held + wanted > self.most:
            raise OverloadedError(
                f"{self.held} replies are generated or wait, {self.most} at most; try again later", self._retry_after()
            )

    def check_number(self, wanted: int) -> None:
        """Raise ``RequestError`` where a request asks for more replies than there are places."""
        if wanted > self.most:
            raise RequestError(f"n={wanted} replies in one request are more than {self.most}; ask for fewer")

    def close(self) -> None:
        """End what works for requests beside the engine."""
        self.grammars.close()
        self.threads.close()

    async def replies(self, prompts: Sequence[Prompt], origin: Origin) -> AsyncGenerator[tuple[int, TextOutput]]:
        """The replies to all ``prompts`` as they come, each piece with its index: ``n`` alternatives side by side.

        Raises ``OverloadedError``, ``EngineStoppedError``; ``RequestError`` where one fails in the engine,
        ``UnknownAdapterError`` or ``UnknownModelError`` where its adapter has just been unloaded.
        """
        requests = list(_requests(prompts, origin))
        places = {request.request.request_id: index for index, request in enumerate(requests)}
        self.check_room(prompts)
        begun = time.monotonic()
        times = self.metrics.watch()
        self.held += len(requests)
        self._running[origin.request_id] = origin.owner, list(places)
        try:
            async with aclosing(self.engine.generate_all(requests)) as outputs:
                async for output in outputs:
                    times.note(output)
                    if output.finish_reason is FinishReason.ERROR:
                        self.check_model(self.model_of(origin))  # it may just have been unloaded
                        raise output.error or _failure(prompts)
                    yield places[output.request_id], output
        finally:
            self.held -= len(requests)
            del self._running[origin.request_id]
            self._durations.append(time.monotonic() - begun)

    async def abort(self, request_id: str | None, owner: str = "") -> int:
        """End the replies to one request of ``owner``, or to all; their clients get an error. How many they were.

        The requests of ``owner`` include those that a proxy sent for its own clients with the key of ``owner``.
        """
        names = [
            name
            for known, (owned_by, names) in self._running.items()
            if request_id in (None, known) and (owned_by == owner or owned_by.startswith(f"{owner}/"))
            for name in names
        ]
        for name in names:
            await self.engine.abort(name)
        return len(names)

    def _retry_after(self) -> int:
        """Seconds until a place may be free: what half of the last requests took."""
        durations = sorted(self._durations)
        return max(1, math.ceil(durations[len(durations) // 2])) if durations else 1


def _failure(prompts: Sequence[Prompt]) -> JaxdeployError:
    """Why the engine gave a request up."""
    if any(prompt.how.sampling.grammar for prompt in prompts):
        return RequestError("response_format cannot be followed with this vocabulary; simplify it")
    return JaxdeployError("the engine could not compile what this request needs; its log says why")


def _count(prompts: Sequence[Prompt]) -> int:
    return sum(prompt.how.n for prompt in prompts)


def _requests(prompts: Sequence[Prompt], origin: Origin) -> Iterator[TextRequest]:
    count = 0
    for prompt in prompts:
        how = prompt.how
        for sampling in how.alternatives():
            request = Request(
                f"{origin.request_id}-{count}",
                prompt.ids,
                sampling,
                priority=origin.priority,
                tenant=origin.tenant,
                session_id=origin.session_id,
                embed=prompt.embed,
                adapter=origin.adapter,
                cache_salt=origin.owner,
            )
            yield TextRequest.of(request, how)
            count += 1
