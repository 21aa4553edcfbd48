"""``/v1/chat/interactive`` and ``/generate``: what LMDeploy's clients ask."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.engine.front.generator import TextOutput
from jaxdeploy.errors import ContextLengthError
from jaxdeploy.messages import FinishReason
from jaxdeploy.server.collected import Collected
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
from jaxdeploy.server.served import Origin, Prompt, Served
from jaxdeploy.server.sessions import SessionKey
from jaxdeploy.server.streaming import LINES, STREAMS, event_stream, line_stream

router = APIRouter(tags=["LMDeploy"])


@router.post("/v1/chat/interactive", response_model=InteractiveReply, responses=LINES)
async def interactive(
    asked: InteractiveRequest, request: Request, served: Model, caller: Caller, reply_id: ReplyId
) -> InteractiveReply | StreamingResponse:
    """Say something in a session that the server remembers."""
    session = caller.session(secrets.randbits(62) if asked.session_id == -1 else asked.session_id)
    if asked.cancel:
        await served.abort(served.sessions.running(session) or "", caller.owner)
        return _silent("stop")
    if asked.request_output_len == 0:
        served.sessions.forget(session)
        return _silent("stop")
    origin = caller.origin(
        f"interactive-{reply_id}",
        session_id=session[1] if asked.interactive_mode else None,
        adapter=served.adapter_of(asked.named),
    )
    pieces = _turn(served, asked, session, origin)
    if asked.stream:
        return await while_connected(request, line_stream(pieces))
    return await while_connected(request, _joined(pieces))


@router.post("/generate", response_model=GenerateReply, responses=STREAMS)
async def generate(
    asked: GenerateRequest, request: Request, served: Model, caller: Caller, reply_id: ReplyId
) -> GenerateReply | StreamingResponse:
    """Go on with a text or with token ids."""
    adapter = served.adapter_of(asked.named)
    prompt = await while_connected(request, _prompt(served, asked))
    origin = caller.origin(f"generate-{reply_id}", session_id=asked.session_id, adapter=adapter)
    if asked.stream:
        served.check_room([prompt])
        return event_stream(_pieces(served, asked, prompt, origin))
    return await while_connected(request, _whole(served, asked, prompt, origin))


async def _prompt(served: Served, asked: GenerateRequest) -> Prompt:
    ids = tuple(asked.input_ids) if asked.input_ids else await served.text_ids(asked.prompt or "")
    return await served.resolved(ids, asked.generation(), chat=False)


async def _turn(
    served: Served, asked: InteractiveRequest, session: SessionKey, origin: Origin
) -> AsyncGenerator[InteractiveReply]:
    """The reply in pieces; what was said is remembered when it is complete.

    A session that is full gets a reply without text that ends by its length, as LMDeploy's client expects.
    """
    with served.sessions.turn(session, origin.request_id) as conversation:
        messages = [*conversation.messages, *asked.messages]
        before, whole = conversation.tokens, Collected()
        try:
            ids = await served.chat_ids(messages)
            prompt = await served.resolved(ids, asked.generation(), chat=True)
        except ContextLengthError:
            yield _silent("length", before)
            return
        async with aclosing(served.replies([prompt], origin)) as pieces:
            async for _, output in pieces:
                whole.add(output)
                yield InteractiveReply(
                    text=output.text,
                    tokens=len(whole.token_ids),
                    input_tokens=max(len(ids) - before, 0),
                    history_tokens=before,
                    finish_reason=output.finish_reason and str(output.finish_reason),
                )
        conversation.messages = with_reply(messages, whole.text)
        conversation.tokens = len(ids) + len(whole.token_ids)
    if not asked.interactive_mode:
        served.sessions.forget(session)


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


async def _pieces(
    served: Served, asked: GenerateRequest, prompt: Prompt, origin: Origin
) -> AsyncGenerator[GenerateReply]:
    count = 0
    async with aclosing(served.replies([prompt], origin)) as outputs:
        async for _, output in outputs:
            count += len(output.token_ids)
            yield _reply(asked, prompt, output, count)


async def _whole(served: Served, asked: GenerateRequest, prompt: Prompt, origin: Origin) -> GenerateReply:
    whole = Collected()
    async with aclosing(served.replies([prompt], origin)) as outputs:
        async for _, output in outputs:
            whole.add(output)
    return _reply(asked, prompt, whole, len(whole.token_ids))


def _reply(asked: GenerateRequest, prompt: Prompt, output: TextOutput | Collected, count: int) -> GenerateReply:
    logprobs = [(token.logprob, token.token_id) for token in output.logprobs] if asked.return_logprob else None
    return GenerateReply(
        text=output.text,
        output_ids=list(output.token_ids),
        meta_info=MetaInfo(
            prompt_tokens=len(prompt.ids),
            completion_tokens=count,
            finish_reason=_ended(output.finish_reason),
            output_token_logprobs=logprobs,
        ),
    )


def _ended(reason: FinishReason | None) -> Ended | None:
    return None if reason is None else Ended(type=reason.value)
