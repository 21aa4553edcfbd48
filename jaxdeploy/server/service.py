"""The model behind the routes: it makes requests, counts running replies and refuses more than its limit."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import Request
from jaxdeploy.server.adapters import ServedAdapters
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.errors import OverloadedError, UnknownModelError
from jaxdeploy.server.grammars import WorkedGrammars
from jaxdeploy.server.metrics import Metrics
from jaxdeploy.server.parsers import reasoning_form, tool_form
from jaxdeploy.server.prompt_encoder import PromptEncoder
from jaxdeploy.server.sessions import Sessions
from jaxdeploy.server.stored_responses import StoredResponses
from jaxdeploy.server.watchdog import Watchdog
from jaxdeploy.tokenizer import Tokenizer

MAX_DURATIONS = 64
"""Finished requests from whose durations ``Retry-After`` is computed."""

EMBEDDING: Mapping[str, Any] = {"do_sample": False, "max_new_tokens": 1}
"""Settings of a request for the hidden states of its prompt."""


class ModelService:
    """One loaded model.

    engine: the engine that runs it.
    name: its name in requests.
    created: seconds since the epoch.
    max_replies: replies that run or wait at the same time.
    num_replies: replies that run or wait now.
    adapters: LoRA adapters of the engine.
    tool_form: module of ``jaxdeploy.server.parsers`` for calls; ``None``: the model has no known form.
    reasoning_form: the same for thoughts.

    The forms are those of the parser names, else those of the chat template. Raises ``ConfigError`` for unknown names.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        name: str,
        max_replies: int,
        *,
        adapters: Mapping[str, str] | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        self.engine = engine
        self.name = name
        self.created = int(time.time())
        self.max_replies = max_replies
        self.num_replies = 0
        self.adapters = ServedAdapters(engine, name, adapters or {})
        self.metrics = Metrics(name)
        self.sessions = Sessions()
        self.responses = StoredResponses()
        self.watchdog = Watchdog()
        self.grammars = WorkedGrammars()
        self.encoder = PromptEncoder(engine.generator)
        template = engine.generator.template.source
        self.tool_form = tool_form(tool_call_parser, template)
        self.reasoning_form = reasoning_form(reasoning_parser, template)
        self._running: dict[str, tuple[str, list[str]]] = {}
        """Id of a request → its owner, and the ids of its replies in the engine."""
        self._durations: deque[float] = deque(maxlen=MAX_DURATIONS)

    @property
    def session_len(self) -> int:
        """Maximum tokens of a prompt and its reply."""
        return self.engine.generator.session_len

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.engine.generator.tokenizer

    def check_model(self, name: str) -> None:
        """Raise ``UnknownModelError`` unless ``name`` is the model's or an adapter's, or empty."""
        if name not in ("", self.name) and name not in self.adapters:
            known = ", ".join(map(repr, (self.name, *self.adapters)))
            raise UnknownModelError(f"model={name!r:.80} is not served here; ask for {known}")

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that a request names as its model, if it is one. Raises ``UnknownModelError``."""
        self.check_model(model)
        return None if model in ("", self.name) else model

    def model_of(self, context: RequestContext) -> str:
        """Return the name of the model that replies to a request: an adapter, or the model itself."""
        return context.adapter or self.name

    async def requests(
        self,
        ids: tuple[int, ...],
        settings: Mapping[str, Any],
        context: RequestContext,
        *,
        chat: bool,
        first: int = 0,
    ) -> list[Request]:
        """Make a request for each of the ``n`` alternatives. This is the record that the engine gets.

        Args:
            ids: the prompt.
            settings: fields of ``GenerationConfig`` that are set, checked by the protocol.
            context: the sender.
            chat: whether the stop words of the chat template apply.
            first: index of the first alternative among the replies to ``context``.

        Raises:
            RequestError: the engine would refuse the requests, or their grammar.
        """
        generator = self.engine.generator
        form = settings.get("response_format")
        grammar = None if form is None else await self.grammars.of(form)
        resolved = generator.resolve(settings, chat=chat, to_grammar=lambda _: grammar)
        request = Request(
            f"{context.request_id}-{first}",
            ids,
            resolved.sampling,
            priority=context.priority,
            tenant=context.tenant,
            session_id=context.session_id,
            adapter=context.adapter,
            cache_salt=context.owner,
            text=resolved.text,
        )
        generator.engine.limits.check(request)
        if resolved.n == 1:
            return [request]
        return [
            replace(request, request_id=f"{context.request_id}-{index}", sampling=sampling)
            for index, sampling in enumerate(resolved.alternatives(), first)
        ]

    async def embedding_request(self, ids: tuple[int, ...], context: RequestContext, index: int) -> Request:
        """Make a request for the hidden states of a prompt. Raises ``RequestError``."""
        (request,) = await self.requests(ids, EMBEDDING, context, chat=False, first=index)
        return replace(request, embed=True)

    def check_room(self, count: int) -> None:
        """Raise ``OverloadedError`` if ``count`` more replies are too many now, ``RequestError`` if always."""
        if count > self.max_replies:
            self.check_number(count)
        if self.num_replies + count > self.max_replies:
            raise OverloadedError(
                f"{self.num_replies} replies are generated or wait, {self.max_replies} at most; try again later",
                self._retry_after(),
            )

    def check_number(self, count: int) -> None:
        """Raise ``RequestError`` if one request asks for more replies than ``max_replies``."""
        if count > self.max_replies:
            raise RequestError(f"n={count} replies in one request are more than {self.max_replies}; ask for fewer")

    @contextmanager
    def admitted(self, requests: Sequence[Request], context: RequestContext) -> Iterator[None]:
        """Count ``requests`` as replies that run or wait; ``abort`` finds them. Raises as ``check_room``."""
        self.check_room(len(requests))
        started = time.monotonic()
        self.num_replies += len(requests)
        self._running[context.request_id] = context.owner, [request.request_id for request in requests]
        try:
            yield
        finally:
            self.num_replies -= len(requests)
            del self._running[context.request_id]
            self._durations.append(time.monotonic() - started)

    async def abort(self, request_id: str | None, owner: str = "") -> int:
        """End the replies to one request of ``owner``, or to all of them, and return their number.

        Their clients get an error. The requests of ``owner`` include those that a proxy sent for its own clients with
        the key of ``owner``.
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

    def close(self) -> None:
        """End the threads and processes that work for requests outside the engine."""
        self.grammars.close()
        self.encoder.close()

    def _retry_after(self) -> int:
        """Return the median duration of the last requests, in seconds."""
        durations = sorted(self._durations)
        return max(1, math.ceil(durations[len(durations) // 2])) if durations else 1
