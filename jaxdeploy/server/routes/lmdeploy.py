"""``/v1/chat/interactive`` and ``/generate``: what LMDeploy's clients ask."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.errors import ContextLengthError
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import FinishReason, TextOutput
from jaxdeploy.messages import Request as Generation
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.conversation import with_reply
from jaxdeploy.server.dependencies import Caller, Model, ReplyId, while_connected
from jaxdeploy.server.protocol.lmdeploy import (
    Ended,
    GenerateReply,
    GenerateRequest,
    InteractiveReply,
    InteractiveRequest,
    MetaInfo,
)
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.service import ModelService
from jaxdeploy.server.sessions import SessionKey
from jaxdeploy.server.streaming import LINES, STREAMS, event_stream, line_stream

router = APIRouter(tags=["LMDeploy"])


@router.post("/v1/chat/interactive", response_model=InteractiveReply, responses=LINES)
async def interactive(
    asked: InteractiveRequest, request: Request, service: Model, caller: Caller, reply_id: ReplyId
) -> InteractiveReply | StreamingResponse:
    """Say something in a session that the server remembers."""
    session = caller.session(secrets.randbits(62) if asked.session_id == -1 else asked.session_id)
    if asked.cancel:
        await service.abort(service.sessions.running(session) or "", caller.owner)
        return _silent("stop")
    if asked.request_output_len == 0:
        service.sessions.forget(session)
        return _silent("stop")
    context = caller.context(
        f"interactive-{reply_id}",
        session_id=session[1] if asked.interactive_mode else None,
        adapter=service.adapter_of(asked.named),
    )
    pieces = _turn(service, asked, session, context)
    if asked.stream:
        return await while_connected(request, line_stream(pieces))
    return await while_connected(request, _joined(pieces))


@router.post("/generate", response_model=GenerateReply, responses=STREAMS)
async def generate(
    asked: GenerateRequest, request: Request, service: Model, caller: Caller, reply_id: ReplyId
) -> GenerateReply | StreamingResponse:
    """Go on with a text or with token ids."""
    adapter = service.adapter_of(asked.named)
    context = caller.context(f"generate-{reply_id}", session_id=asked.session_id, adapter=adapter)
    requests = await while_connected(request, _requests(service, asked, context))
    replies = Replies(service, requests, context, partial(Reply, keeps_content=not asked.stream))
    if asked.stream:
        replies.check_room()
        return event_stream(_pieces(asked, replies))
    return await while_connected(request, _whole(asked, replies))


async def _requests(service: ModelService, asked: GenerateRequest, context: RequestContext) -> list[Generation]:
    ids = tuple(asked.input_ids) if asked.input_ids else await service.encoder.text_ids(asked.prompt or "")
    return await service.requests(ids, asked.generation(), context, chat=False)


async def _turn(
    service: ModelService, asked: InteractiveRequest, session: SessionKey, context: RequestContext
) -> AsyncGenerator[InteractiveReply]:
    """The reply in pieces; what was said is remembered when it is complete.

    A session that is full gets a reply without text that ends by its length, as LMDeploy's client expects.
    """
    with service.sessions.turn(session, context.request_id) as conversation:
        messages = [*conversation.messages, *asked.messages]
        before = conversation.tokens
        try:
            ids = await service.encoder.chat_ids(messages)
            requests = await service.requests(ids, asked.generation(), context, chat=True)
        except ContextLengthError:
            yield _silent("length", before)
            return
        replies = Replies(service, requests, context, Reply)
        (reply,) = replies.replies
        async with aclosing(replies.outputs()) as outputs:
            async for _, output in outputs:
                yield InteractiveReply(
                    text=output.text,
                    tokens=reply.num_tokens,
                    input_tokens=max(len(ids) - before, 0),
                    history_tokens=before,
                    finish_reason=output.finish_reason and str(output.finish_reason),
                )
        conversation.messages = with_reply(messages, reply.text)
        conversation.tokens = len(ids) + reply.num_tokens
    if not asked.interactive_mode:
        service.sessions.forget(session)


def _silent(finish_reason: str, history_tokens: int = 0) -> InteractiveReply:
    """A reply without text."""
    return InteractiveReply(
        text="", tokens=0, input_tokens=0, history_tokens=history_tokens, finish_reason=finish_reason
    )


async def _joined(pieces: AsyncGenerator[InteractiveReply]) -> InteractiveReply:
    async with aclosing(pieces):
        texts = []
        async for piece in pieces:
            texts.append(piece.text)
            last = piece
        return last.model_copy(update={"text": "".join(texts)})


async def _pieces(asked: GenerateRequest, replies: Replies[Reply]) -> AsyncGenerator[GenerateReply]:
    (reply,) = replies.replies
    async with aclosing(replies.outputs()) as outputs:
        async for _, output in outputs:
            yield _reply(asked, replies, output, reply.num_tokens)


async def _whole(asked: GenerateRequest, replies: Replies[Reply]) -> GenerateReply:
    (reply,) = await replies.whole()
    return _reply(asked, replies, reply, reply.num_tokens)


def _reply(
    asked: GenerateRequest, replies: Replies[Reply], output: TextOutput | Reply, num_tokens: int
) -> GenerateReply:
    logprobs = [(token.logprob, token.token_id) for token in output.logprobs] if asked.return_logprob else None
    return GenerateReply(
        text=output.text,
        output_ids=list(output.token_ids),
        meta_info=MetaInfo(
            prompt_tokens=len(replies.requests[0].prompt_token_ids),
            completion_tokens=num_tokens,
            finish_reason=_ended(output.finish_reason),
            output_token_logprobs=logprobs,
        ),
    )


def _ended(reason: FinishReason | None) -> Ended | None:
    return None if reason is None else Ended(type=reason.value)
