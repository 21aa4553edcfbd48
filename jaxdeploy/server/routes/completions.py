"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.messages import PromptReading, TokenLogprob
from jaxdeploy.server.collected import Collected, Counts, collect, token_text
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
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
    asked: CompletionRequest, request: Request, served: Model, caller: Caller, reply_id: ReplyId
) -> CompletionReply | StreamingResponse:
    """Go on with a text, or with each of several."""
    adapter = served.adapter_of(asked.model)
    origin = caller.origin(f"cmpl-{reply_id}", user=asked.user or "", priority=asked.priority, adapter=adapter)
    served.check_number(len(asked.prompts) * (asked.n or 1))
    prompts = await while_connected(request, _resolved(served, asked))
    job = _Job(served, asked, prompts, origin)
    if asked.stream:
        served.check_room(prompts)
        return event_stream(job.chunks(), ping=job.silence())
    return await while_connected(request, job.whole())


async def _resolved(served: Served, asked: CompletionRequest) -> list[Prompt]:
    config = asked.generation()
    return [await served.resolved(await served.ids_of(given), config, chat=False) for given in asked.prompts]


class _Job:
    """The replies to one request."""

    def __init__(self, served: Served, asked: CompletionRequest, prompts: Sequence[Prompt], origin: Origin) -> None:
        self._served, self._asked, self._prompts, self._origin = served, asked, prompts, origin
        self._created = int(time.time())
        n = prompts[0].how.n
        self._counts = Counts(sum(len(prompt.ids) for prompt in prompts), n)
        self._echoes = [self._echo(prompt) for prompt in prompts for _ in range(n)]
        self._offsets = [0 if asked.scores_prompt else len(echo) for echo in self._echoes]
        scored = [len(prompt.ids) if asked.scores_prompt else 0 for prompt in prompts for _ in range(n)]
        self._prompt_tokens = scored
        """Prompt tokens of each reply whose log-probabilities are still to be reported."""
        self._runs = asked.max_tokens != 0 or asked.scores_prompt

    async def whole(self) -> CompletionReply:
        """All of them in one answer."""
        if self._runs:
            async with aclosing(self._served.replies(self._prompts, self._origin)) as pieces:
                replies = await collect(pieces, len(self._echoes), self._counts)
        else:
            replies = [Collected() for _ in self._echoes]
        return CompletionReply(
            id=self._origin.request_id,
            created=self._created,
            model=self._served.model_of(self._origin),
            choices=[self._whole_choice(index, reply) for index, reply in enumerate(replies)],
            usage=self._counts.usage,
        )

    async def chunks(self) -> AsyncGenerator[CompletionReply]:
        """Piece by piece."""
        asked = self._asked
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        ends = "length" if asked.max_tokens == 0 else None
        if not asked.scores_prompt:
            for index, echo in enumerate(self._echoes):
                if echo:
                    yield self._chunk(self._choice(index, echo, [], ends))
        if self._runs:
            async with aclosing(self._served.replies(self._prompts, self._origin)) as pieces:
                async for index, output in pieces:
                    self._counts.add(index, output)
                    if output.prompt is not None:
                        scores = self._prompt_scores(index, output.prompt)
                        yield self._chunk(self._choice(index, self._echoes[index], scores, ends))
                    if asked.max_tokens != 0 and (output.text or output.finish_reason or output.logprobs):
                        yield self._chunk(self._choice(index, output.text, output.logprobs, output.finish_reason))
        if with_usage:
            yield self._chunk()

    def silence(self) -> CompletionReply:
        """A chunk that adds nothing."""
        return self._chunk(CompletionChoice(index=0, text="", finish_reason=None))

    def _whole_choice(self, index: int, reply: Collected) -> CompletionChoice:
        if self._asked.max_tokens == 0:
            reply = Collected(prompt=reply.prompt)
        scores: list[TokenLogprob | int] = [] if reply.prompt is None else self._prompt_scores(index, reply.prompt)
        scores += reply.logprobs
        return self._choice(index, self._echoes[index] + reply.text, scores, reply.finish_reason or "length")

    def _chunk(self, *choices: CompletionChoice) -> CompletionReply:
        chunk = CompletionReply(
            id=self._origin.request_id,
            object="text_completion",
            created=self._created,
            model=self._served.model_of(self._origin),
            choices=list(choices),
        )
        if not choices:
            chunk.usage = self._counts.usage
        return chunk

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob | int], finish_reason: str | None
    ) -> CompletionChoice:
        reason = None if finish_reason is None else str(finish_reason)
        found = None if self._asked.logprobs is None else self._logprobs(index, logprobs)
        return CompletionChoice(index=index, text=text, logprobs=found, finish_reason=reason)

    def _prompt_scores(self, index: int, reading: PromptReading) -> list[TokenLogprob | int]:
        """The first token of a prompt, of which there is nothing to say, and the others."""
        return [self._prompts[index // self._counts.n].ids[0], *reading.logprobs]

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob | int]) -> CompletionLogprobs:
        tokenizer = self._served.tokenizer
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
        how = self._prompts[index // self._counts.n].how
        return token_id in self._served.tokenizer.special_ids and (in_prompt or how.skip_special_tokens)

    def _echo(self, prompt: Prompt) -> str:
        return self._served.tokenizer.decode(prompt.ids) if self._asked.echo else ""
