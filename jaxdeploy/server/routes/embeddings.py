"""``/v1/embeddings``."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Request

from jaxdeploy.api.embedding import pooled
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import PromptResult
from jaxdeploy.messages import Request as Generation
from jaxdeploy.server.context import RequestContext
from jaxdeploy.server.dependencies import Model, ReplyId, while_connected
from jaxdeploy.server.protocol.embeddings import Embedding, EmbeddingsReply, EmbeddingsRequest, EmbeddingsUsage
from jaxdeploy.server.replies import Replies
from jaxdeploy.server.service import ModelService

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/embeddings")
async def embeddings(asked: EmbeddingsRequest, request: Request, service: Model, reply_id: ReplyId) -> EmbeddingsReply:
    """The vectors of one text or several."""
    adapter = service.adapter_of(asked.model)
    service.check_number(len(asked.prompts))
    context = RequestContext(f"embd-{reply_id}", asked.user or "", asked.priority, adapter=adapter)
    requests = await while_connected(request, _requests(service, asked, context))
    replies = Replies(service, requests, context, Reply)
    await while_connected(request, replies.whole())
    results = [reply.prompt for reply in replies.replies if reply.prompt is not None]
    tokens = sum(len(request.prompt_token_ids) for request in requests)
    return EmbeddingsReply(
        data=[Embedding(index=index, embedding=_vector(asked, result)) for index, result in enumerate(results)],
        model=replies.model,
        usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


async def _requests(service: ModelService, asked: EmbeddingsRequest, context: RequestContext) -> list[Generation]:
    prompts = [await service.encoder.ids_of(given) for given in asked.prompts]
    return [await service.embedding_request(ids, context, index) for index, ids in enumerate(prompts)]


def _vector(asked: EmbeddingsRequest, result: PromptResult) -> list[float] | str:
    vector = pooled(result, asked.pooling, normalize=asked.normalize, dimensions=asked.dimensions)
    if asked.encoding_format != "base64":
        return vector
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
