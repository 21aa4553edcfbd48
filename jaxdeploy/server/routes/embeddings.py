"""``/v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np
from fastapi import APIRouter, Request

from jaxdeploy.api.embedding import pooled
from jaxdeploy.messages import PromptReading
from jaxdeploy.server.dependencies import Model, ReplyId, while_connected
from jaxdeploy.server.protocol.embeddings import Embedding, EmbeddingsReply, EmbeddingsRequest, EmbeddingsUsage
from jaxdeploy.server.served import Origin, Prompt, Served

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/embeddings")
async def embeddings(asked: EmbeddingsRequest, request: Request, served: Model, reply_id: ReplyId) -> EmbeddingsReply:
    """The vectors of one text or several."""
    adapter = served.adapter_of(asked.model)
    served.check_number(len(asked.prompts))
    prompts = await while_connected(request, _prompts(served, asked))
    origin = Origin(f"embd-{reply_id}", asked.user or "", asked.priority, adapter=adapter)
    readings = await while_connected(request, _read(served, prompts, origin))
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return EmbeddingsReply(
        data=[Embedding(index=index, embedding=_vector(asked, reading)) for index, reading in enumerate(readings)],
        model=served.model_of(origin),
        usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


async def _prompts(served: Served, asked: EmbeddingsRequest) -> list[Prompt]:
    return [await served.to_read(await served.ids_of(given)) for given in asked.prompts]


async def _read(served: Served, prompts: Sequence[Prompt], origin: Origin) -> list[PromptReading]:
    readings: dict[int, PromptReading] = {}
    async with aclosing(served.replies(prompts, origin)) as pieces:
        async for index, output in pieces:
            if output.prompt is not None:
                readings[index] = output.prompt
    return [readings[index] for index in range(len(prompts))]


def _vector(asked: EmbeddingsRequest, reading: PromptReading) -> list[float] | str:
    vector = pooled(reading, asked.pooling, normalize=asked.normalize, dimensions=asked.dimensions)
    if asked.encoding_format != "base64":
        return vector
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
