"""The replies to the requests of one HTTP call, as they arrive from the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from jaxdeploy.errors import JaxdeployError, RequestError
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import FinishReason, Request, SpeculationCounts, TextOutput
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.protocol.usage import Usage
from jaxdeploy.server.service import ModelService

R = TypeVar("R", bound=Reply)


class Replies(Generic[R]):
    """Runs ``requests`` and collects their replies.

    requests: one for each reply; the alternatives of a prompt are adjacent.
    context: the sender.
    n: number of alternatives of each prompt.
    model: name of the model that replies.
    replies: one ``make_reply()`` for each request.
    """

    def __init__(
        self,
        service: ModelService,
        requests: Sequence[Request],
        context: RequestContext,
        make_reply: Callable[[], R],
        n: int = 1,
    ) -> None:
        self.service = service
        self.requests = requests
        self.context = context
        self.n = n
        self.model = service.model_of(context)
        self.replies = [make_reply() for _ in requests]

    @property
    def usage(self) -> Usage:
        """The tokens so far. Alternatives share their prompt."""
        prompts = range(0, len(self.requests), self.n)
        cached = [max(reply.cached_tokens for reply in self.replies[start : start + self.n]) for start in prompts]
        drafts = SpeculationCounts(*map(sum, zip(*(reply.speculation for reply in self.replies), strict=True)))
        return Usage.of(
            sum(len(self.requests[start].prompt_token_ids) for start in prompts),
            sum(reply.num_tokens for reply in self.replies),
            sum(cached),
            drafts,
        )

    def check_room(self) -> None:
        """Raise ``OverloadedError`` if they are too many now."""
        self.service.check_room(len(self.requests))

    async def outputs(self) -> AsyncGenerator[tuple[int, TextOutput]]:
        """Add outputs to ``replies`` as they arrive, and yield each with the index of its reply.

        Raises:
            OverloadedError, EngineStoppedError: the requests cannot run.
            RequestError: one failed in the engine.
            UnknownAdapterError, UnknownModelError: its adapter was unloaded meanwhile.
        """
        indices = {request.request_id: index for index, request in enumerate(self.requests)}
        with self.service.admitted(self.requests, self.context):
            async with aclosing(self.service.engine.generate_all(self.requests)) as outputs:
                async for output in outputs:
                    index = indices[output.request_id]
                    reply = self.replies[index]
                    reply.add(output)
                    self.service.metrics.note(reply, output)
                    if output.finish_reason is FinishReason.ERROR:
                        self.service.check_model(self.model)  # it may have been unloaded
                        raise output.error or self._failure()
                    yield index, output

    async def whole(self) -> list[R]:
        """Return the complete replies. Raises as ``outputs``."""
        async with aclosing(self.outputs()) as outputs:
            async for _ in outputs:
                pass
        return self.replies

    def _failure(self) -> JaxdeployError:
        if any(request.sampling.grammar for request in self.requests):
            return RequestError("response_format cannot be followed with this vocabulary; simplify it")
        return JaxdeployError("the engine could not compile what this request needs; its log says why")
