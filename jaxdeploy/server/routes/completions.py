"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.messages import TokenLogprob
from jaxdeploy.server.collected import Collected, Counts, collect, token_text
from jaxdeploy.server.dependencies import Model, ReplyId, while_connected
from jaxdeploy.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from jaxdeploy.server.served import Origin, Prompt, Served
from jaxdeploy.server.streaming import STREAMS, event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=CompletionReply, responses=STREAMS)
async def completions(
    asked: CompletionRequest, request: Request, served: Model, reply_id: ReplyId
) -> CompletionReply | StreamingResponse:
    """Go on with a text, or with each of several."""
    served.check_model(asked.model)
    config = asked.generation()
    prompts = []
    for given in asked.prompts:
        ids = await served.text_ids(given) if isinstance(given, str) else tuple(given)
        prompts.append(await served.resolved(ids, config, chat=False))
    origin = Origin(f"cmpl-{reply_id}", asked.user or "", asked.priority)
    job = _Job(served, asked, prompts, origin)
    if asked.stream:
        served.check_room(prompts)
        return event_stream(job.chunks())
    return await while_connected(request, job.whole())


class _Job:
    """The replies to one request."""

    def __init__(self, served: Served, asked: CompletionRequest, prompts: Sequence[Prompt], origin: Origin) -> None:
        self._served, self._asked, self._prompts, self._origin = served, asked, prompts, origin
        self._created = int(time.time())
        n = prompts[0].how.n
        self._counts = Counts(sum(len(prompt.ids) for prompt in prompts), n)
        self._echoes = [self._echo(prompt) for prompt in prompts for _ in range(n)]
        self._offsets = [len(echo) for echo in self._echoes]

    async def whole(self) -> CompletionReply:
        """All of them in one answer."""
        if self._asked.max_tokens == 0:
            replies = [Collected(finish_reason=None) for _ in self._echoes]
        else:
            async with aclosing(self._served.replies(self._prompts, self._origin)) as pieces:
                replies = await collect(pieces, len(self._echoes), self._counts)
        return CompletionReply(
            id=self._origin.request_id,
            created=self._created,
            model=self._served.name,
            choices=[
                self._choice(index, self._echoes[index] + reply.text, reply.logprobs, reply.finish_reason or "length")
                for index, reply in enumerate(replies)
            ],
            usage=self._counts.usage,
        )

    async def chunks(self) -> AsyncGenerator[CompletionReply]:
        """Piece by piece."""
        asked = self._asked
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        for index, echo in enumerate(self._echoes):
            if echo or asked.max_tokens == 0:
                yield self._chunk(self._choice(index, echo, [], "length" if asked.max_tokens == 0 else None))
        if asked.max_tokens != 0:
            async with aclosing(self._served.replies(self._prompts, self._origin)) as pieces:
                async for index, output in pieces:
                    self._counts.add(index, output)
                    if output.text or output.finish_reason or output.logprobs:
                        yield self._chunk(self._choice(index, output.text, output.logprobs, output.finish_reason))
        if with_usage:
            yield self._chunk()

    def _chunk(self, *choices: CompletionChoice) -> CompletionReply:
        chunk = CompletionReply(
            id=self._origin.request_id,
            object="text_completion",
            created=self._created,
            model=self._served.name,
            choices=list(choices),
        )
        if not choices:
            chunk.usage = self._counts.usage
        return chunk

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None
    ) -> CompletionChoice:
        reason = None if finish_reason is None else str(finish_reason)
        found = None if self._asked.logprobs is None else self._logprobs(index, logprobs)
        return CompletionChoice(index=index, text=text, logprobs=found, finish_reason=reason)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs:
        tokenizer = self._served.tokenizer
        texts = [token_text(tokenizer, token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                {token_text(tokenizer, token_id): value for token_id, value in token.top} for token in tokens
            ],
            text_offset=offsets,
        )

    def _echo(self, prompt: Prompt) -> str:
        return self._served.tokenizer.decode(prompt.ids) if self._asked.echo else ""
