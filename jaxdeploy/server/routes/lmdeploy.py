"""``/v1/chat/interactive`` and ``/generate``: what LMDeploy's clients ask."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from jaxdeploy.engine.generator import TextOutput
from jaxdeploy.messages import FinishReason
from jaxdeploy.server.collected import Collected
from jaxdeploy.server.dependencies import Model, ReplyId, while_connected
from jaxdeploy.server.protocol.lmdeploy import (
    Ended,
    GenerateReply,
    GenerateRequest,
    InteractiveReply,
    InteractiveRequest,
    MetaInfo,
)
from jaxdeploy.server.served import Origin, Prompt, Served
from jaxdeploy.server.streaming import LINES, STREAMS, event_stream, line_stream

router = APIRouter(tags=["LMDeploy"])


@router.post("/v1/chat/interactive", response_model=InteractiveReply, responses=LINES)
async def interactive(
    asked: InteractiveRequest, request: Request, served: Model, reply_id: ReplyId
) -> InteractiveReply | StreamingResponse:
    """Say something in a session that the server remembers."""
    if asked.cancel:
        await served.abort(served.sessions.running(asked.session_id) or "")
        return InteractiveReply(text="", tokens=0, input_tokens=0, history_tokens=0, finish_reason=None)
    pieces = _turn(served, asked, f"interactive-{reply_id}")
    if asked.stream:
        return await while_connected(request, line_stream(pieces))
    return await while_connected(request, _joined(pieces))


@router.post("/generate", response_model=GenerateReply, responses=STREAMS)
async def generate(
    asked: GenerateRequest, request: Request, served: Model, reply_id: ReplyId
) -> GenerateReply | StreamingResponse:
    """Go on with a text or with token ids."""
    adapter = served.adapter_of(asked.named)
    prompt = await while_connected(request, _prompt(served, asked))
    session = None if asked.session_id in (None, -1) else str(asked.session_id)
    origin = Origin(f"generate-{reply_id}", session_id=session, adapter=adapter)
    if asked.stream:
        served.check_room([prompt])
        return event_stream(_pieces(served, asked, prompt, origin))
    return await while_connected(request, _whole(served, asked, prompt, origin))


async def _prompt(served: Served, asked: GenerateRequest) -> Prompt:
    ids = tuple(asked.input_ids) if asked.input_ids else await served.text_ids(asked.prompt or "")
    return await served.resolved(ids, asked.generation(), chat=False)


async def _turn(served: Served, asked: InteractiveRequest, request_id: str) -> AsyncGenerator[InteractiveReply]:
    """The reply in pieces; what was said is remembered when it is complete."""
    adapter = served.adapter_of(asked.named)
    session_id = secrets.randbits(62) if asked.session_id == -1 else asked.session_id
    with served.sessions.turn(session_id, request_id) as conversation:
        messages = [*conversation.messages, *asked.messages]
        ids = await served.chat_ids(messages)
        prompt = await served.resolved(ids, asked.generation(), chat=True)
        before, whole = conversation.tokens, Collected()
        kept = str(session_id) if asked.interactive_mode else None
        origin = Origin(request_id, session_id=kept, adapter=adapter)
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
        conversation.messages = [*messages, {"role": "assistant", "content": whole.text}]
        conversation.tokens = len(ids) + len(whole.token_ids)
    if not asked.interactive_mode:
        served.sessions.forget(session_id)


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
