"""The model behind the routes: prompts become token ids, token ids become replies; too many of them are turned away."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxdeploy.config import GenerationConfig
from jaxdeploy.engine.async_engine import AsyncEngine
from jaxdeploy.engine.generator import TextOutput, TextRequest
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import JaxdeployError, RequestError
from jaxdeploy.generation_config import ResolvedGeneration, resolve
from jaxdeploy.messages import FinishReason, Request
from jaxdeploy.server.adapters import ServedAdapters
from jaxdeploy.server.errors import OverloadedError, UnknownModelError
from jaxdeploy.server.metrics import Metrics
from jaxdeploy.server.parsers import reasoning_form, tool_form
from jaxdeploy.server.sessions import Sessions
from jaxdeploy.server.stored_responses import StoredResponses
from jaxdeploy.tokenizer import Tokenizer

T = TypeVar("T")

TAIL = 16
"""Tokens of a prompt's end that a mark is looked for in."""

REMEMBERED = 64
"""Requests whose durations say how long one that is turned away should wait."""


@dataclass(frozen=True)
class Origin:
    """What a request is beside its prompts: its id in the logs, who shares with whom, what comes first.

    ``adapter`` is the LoRA adapter that it asks for.
    """

    request_id: str
    tenant: str = ""
    priority: int = 0
    session_id: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids, and how to go on with them."""

    ids: tuple[int, ...]
    how: ResolvedGeneration
    embed: bool = False
    """Its hidden states are wanted."""


class Pulse:
    """Whether an engine that has something to do does it, as seen from the times at which somebody looks."""

    def __init__(self) -> None:
        self._steps = -1
        self._changed = 0.0

    def still_for(self, stats: EngineStats) -> float:
        """Seconds for which the engine has had work and run no step."""
        now = time.monotonic()
        if stats.steps != self._steps or not (stats.running or stats.waiting):
            self._steps, self._changed = stats.steps, now
        return now - self._changed


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
        template = engine.generator.template.source
        self.tool_form = tool_form(tool_call_parser, template)
        self.reasoning_form = reasoning_form(reasoning_parser, template)
        self._running: dict[str, list[str]] = {}
        """A request's id → what its replies are called in the engine."""
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
        made = self.engine.generator
        return tuple(await apart(lambda: made.template.encode(messages, made.tokenizer, **variables)))

    async def text_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a raw text, with the token that texts begin with. Raises ``RequestError`` if there are none."""
        made = self.engine.generator
        ids = await apart(lambda: made.template.encode_text(text, made.tokenizer))
        if not ids and made.tokenizer.bos_token_id is not None:
            ids = [made.tokenizer.bos_token_id]
        if not ids:
            raise RequestError("prompt='' has no tokens, and this model has no token to begin with; write some text")
        return tuple(ids)

    async def ids_of(self, given: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a raw text, or those that are given."""
        return await self.text_ids(given) if isinstance(given, str) else tuple(given)

    def ends_with(self, ids: Sequence[int], mark: str) -> bool:
        """Whether a prompt ends with ``mark``."""
        return self.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False).rstrip().endswith(mark)

    async def resolved(self, ids: tuple[int, ...], config: GenerationConfig, *, chat: bool) -> Prompt:
        """``config`` without gaps, for ``ids``. Raises ``RequestError`` for what the engine would refuse."""
        made = self.engine.generator

        def fill() -> ResolvedGeneration:
            return resolve(
                config,
                made.generation_defaults,
                made.tokenizer,
                eos_token_ids=made.eos_token_ids,
                template_stops=made.template.stop_words if chat else (),
            )

        how = fill() if config.response_format is None else await apart(fill)  # a grammar may take its time
        made.engine.limits.check(Request("", ids, how.sampling))
        return Prompt(ids, how)

    async def to_read(self, ids: tuple[int, ...]) -> Prompt:
        """A prompt of which nothing is wanted but its hidden states. Raises ``RequestError``."""
        prompt = await self.resolved(ids, GenerationConfig(do_sample=False, max_new_tokens=1), chat=False)
        return replace(prompt, embed=True)

    def check_room(self, prompts: Sequence[Prompt]) -> None:
        """Raise ``OverloadedError`` if replies to all ``prompts`` are too many now, ``RequestError`` if always."""
        wanted = _count(prompts)
        if wanted > self.most:
            raise RequestError(f"n={wanted} replies in one request are more than {self.most}; ask for fewer")
        if self.held + wanted > self.most:
            raise OverloadedError(
                f"{self.held} replies are generated or wait, {self.most} at most; try again later", self._retry_after()
            )

    async def replies(self, prompts: Sequence[Prompt], origin: Origin) -> AsyncGenerator[tuple[int, TextOutput]]:
        """The replies to all ``prompts`` as they come, each piece with its index: ``n`` alternatives side by side.

        Raises ``OverloadedError``, ``EngineStoppedError``; ``RequestError`` where one fails in the engine,
        ``UnknownAdapterError`` or ``UnknownModelError`` where its adapter has just been unloaded.
        """
        requests = list(_requests(prompts, origin))
        places = {request.request.request_id: index for index, request in enumerate(requests)}
        self.check_room(prompts)
        self.held += len(requests)
        self._running[origin.request_id] = list(places)
        begun, times = time.monotonic(), self.metrics.watch()
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

    async def abort(self, request_id: str | None) -> int:
        """End the replies to one request, or to all; those who wait for them get an error. How many they were."""
        named = self._running.values() if request_id is None else [self._running.get(request_id, [])]
        names = [name for names in named for name in names]
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


async def apart(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread, so that others are not kept waiting by a long text."""
    return await asyncio.to_thread(work)


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
            )
            yield TextRequest.of(request, how)
            count += 1
