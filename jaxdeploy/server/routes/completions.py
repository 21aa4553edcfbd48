"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import PromptResult, TokenLogprob
from jaxdeploy.messages import Request as Generation
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.logprobs import token_text
from jaxdeploy.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.service import ModelService
from jaxdeploy.server.streaming import STREAMS, event_stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=CompletionReply, responses=STREAMS)
async def completions(
    asked: CompletionRequest, request: Request, service: Model, caller: Caller, reply_id: ReplyId
) -> CompletionReply | StreamingResponse:
    """Go on with a text, or with each of several."""
    adapter = service.adapter_of(asked.model)
    context = caller.context(f"cmpl-{reply_id}", user=asked.user or "", priority=asked.priority, adapter=adapter)
    service.check_number(len(asked.prompts) * (asked.n or 1))
    requests = await while_connected(request, _requests(service, asked, context))
    make_reply = partial(Reply, keeps_content=not asked.stream)
    job = _Job(asked, Replies(service, requests, context, make_reply, asked.n or 1))
    if asked.stream:
        job.replies.check_room()
        return event_stream(job.chunks(), ping=job.silence)
    return await while_connected(request, job.whole())


async def _requests(service: ModelService, asked: CompletionRequest, context: RequestContext) -> list[Generation]:
    settings = asked.generation()
    requests: list[Generation] = []
    for given in asked.prompts:
        ids = await service.encoder.ids_of(given)
        requests += await service.requests(ids, settings, context, chat=False, first=len(requests))
    return requests


class _Job:
    """``replies`` in OpenAI's form."""

    def __init__(self, asked: CompletionRequest, replies: Replies[Reply]) -> None:
        self._asked, self.replies = asked, replies
        self._created = int(time.time())
        self._tokenizer = replies.service.tokenizer
        self._echoes = [self._echo(request) for request in replies.requests]
        self._offsets = [0 if asked.scores_prompt else len(echo) for echo in self._echoes]
        self._prompt_tokens = [
            len(request.prompt_token_ids) if asked.scores_prompt else 0 for request in replies.requests
        ]
        """Prompt tokens of each reply whose log-probabilities are still to be reported."""
        self._runs = asked.max_tokens != 0 or asked.scores_prompt

    async def whole(self) -> CompletionReply:
        """Return all replies in one answer."""
        replies = await self.replies.whole() if self._runs else self.replies.replies
        return CompletionReply(
            id=self.replies.context.request_id,
            created=self._created,
            model=self.replies.model,
            choices=[self._whole_choice(index, reply) for index, reply in enumerate(replies)],
            usage=self.replies.usage,
        )

    async def chunks(self) -> AsyncGenerator[CompletionReply]:
        """Yield the replies piece by piece."""
        asked = self._asked
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        ends = "length" if asked.max_tokens == 0 else None
        if not asked.scores_prompt:
            for index, echo in enumerate(self._echoes):
                if echo:
                    yield self._chunk(self._choice(index, echo, [], ends))
        if self._runs:
            async with aclosing(self.replies.outputs()) as outputs:
                async for index, output in outputs:
                    if output.prompt is not None:
                        scores = self._prompt_scores(index, output.prompt)
                        yield self._chunk(self._choice(index, self._echoes[index], scores, ends))
                    if asked.max_tokens != 0 and (output.text or output.finish_reason or output.logprobs):
                        yield self._chunk(self._choice(index, output.text, output.logprobs, output.finish_reason))
        if with_usage:
            yield self._chunk()

    def silence(self) -> CompletionReply:
        """Return a chunk that adds nothing."""
        return self._chunk(CompletionChoice(index=0, text="", finish_reason=None))

    def _whole_choice(self, index: int, reply: Reply) -> CompletionChoice:
        if self._asked.max_tokens == 0:
            reply = Reply(prompt=reply.prompt)
        scores: list[TokenLogprob | int] = [] if reply.prompt is None else self._prompt_scores(index, reply.prompt)
        scores += reply.logprobs
        return self._choice(index, self._echoes[index] + reply.text, scores, reply.finish_reason or "length")

    def _chunk(self, *choices: CompletionChoice) -> CompletionReply:
        chunk = CompletionReply(
            id=self.replies.context.request_id,
            object="text_completion",
            created=self._created,
            model=self.replies.model,
            choices=list(choices),
        )
        if not choices:
            chunk.usage = self.replies.usage
        return chunk

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob | int], finish_reason: str | None
    ) -> CompletionChoice:
        reason = None if finish_reason is None else str(finish_reason)
        found = None if self._asked.logprobs is None else self._logprobs(index, logprobs)
        return CompletionChoice(index=index, text=text, logprobs=found, finish_reason=reason)

    def _prompt_scores(self, index: int, result: PromptResult) -> list[TokenLogprob | int]:
        """The first token of a prompt, of which there is nothing to say, and the others."""
        return [self.replies.requests[index].prompt_token_ids[0], *result.logprobs]

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob | int]) -> CompletionLogprobs:
        tokenizer = self._tokenizer
        scores = [None if isinstance(token, int) else token for token in tokens]
        ids = [token if isinstance(token, int) else token.token_id for token in tokens]
        texts = [token_text(tokenizer, token_id) for token_id in ids]
        offsets = []
        for token_id, text in zip(ids, texts, strict=True):
            offsets.append(self._offsets[index])
            if not self._hides(index, token_id):
                self._offsets[index] += len(text)
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[None if score is None else score.logprob for score in scores],
            top_logprobs=[
                None if score is None else {token_text(tokenizer, token_id): value for token_id, value in score.top}
                for score in scores
            ],
            text_offset=offsets,
        )

    def _hides(self, index: int, token_id: int) -> bool:
        """Return whether the next token of reply ``index`` is special and left out of the text."""
        in_prompt = self._prompt_tokens[index] > 0
        self._prompt_tokens[index] -= in_prompt
        skips = self.replies.requests[index].text.skip_special_tokens
        return token_id in self._tokenizer.special_ids and (in_prompt or skips)

    def _echo(self, request: Generation) -> str:
        return self._tokenizer.decode(request.prompt_token_ids) if self._asked.echo else ""
