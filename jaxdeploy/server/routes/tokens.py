"""Tokens from texts and back: ``/tokenize``, ``/detokenize``, ``/v1/encode`` and ``/tokenizer_info``."""

from __future__ import annotations

from fastapi import APIRouter, Request

from jaxdeploy.server.dependencies import Model, while_connected
from jaxdeploy.server.protocol.tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    EncodeReply,
    EncodeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfo,
)
from jaxdeploy.server.service import ModelService

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(asked: TokenizeRequest, request: Request, service: Model) -> TokenizeReply:
    """Token ids of a text, or of a conversation as the model would read it."""
    service.check_model(asked.model)
    ids = await while_connected(request, _tokens(service, asked))
    texts = None
    if asked.return_token_strs:
        texts = await service.encoder.threads.run(lambda: list(map(service.tokenizer.id_to_token, ids)), len(ids))
    return TokenizeReply(count=len(ids), max_model_len=service.session_len, tokens=ids, token_strs=texts)


@router.post("/detokenize")
async def detokenize(asked: DetokenizeRequest, service: Model) -> DetokenizeReply:
    """The text of token ids."""
    service.check_model(asked.model)
    decode, ids = service.tokenizer.decode, asked.tokens
    text = await service.encoder.threads.run(lambda: decode(ids, skip_special_tokens=False), len(ids))
    return DetokenizeReply(prompt=text)


@router.post("/v1/encode")
async def encode(asked: EncodeRequest, request: Request, service: Model) -> EncodeReply:
    """Token ids of a text or of several, as LMDeploy gives them."""
    found = await while_connected(request, _encoded(service, asked))
    lengths = [len(ids) for ids in found]
    if isinstance(asked.input, str):
        return EncodeReply(input_ids=found[0], length=lengths[0])
    return EncodeReply(input_ids=found, length=lengths)


@router.get("/tokenizer_info")
async def tokenizer_info(service: Model) -> TokenizerInfo:
    """What there is to know of the tokenizer."""
    tokenizer = service.tokenizer
    return TokenizerInfo(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        special_tokens=dict(tokenizer.special_tokens),
        chat_template=tokenizer.chat_template,
        max_model_len=service.session_len,
    )


async def _tokens(service: ModelService, asked: TokenizeRequest) -> list[int]:
    if asked.messages is None:
        return await service.encoder.count_text_ids(asked.prompt or "", add_bos=asked.add_special_tokens)
    messages = [message.model_dump() for message in asked.messages]
    ending = {name: getattr(asked, name) for name in ("add_generation_prompt", "continue_final_message")}
    return await service.encoder.count_chat_ids(messages, **(asked.chat_template_kwargs or {}), **ending)


async def _encoded(service: ModelService, asked: EncodeRequest) -> list[list[int]]:
    found = []
    for text in [asked.input] if isinstance(asked.input, str) else asked.input:
        if asked.do_preprocess:
            found.append(await service.encoder.count_chat_ids([{"role": "user", "content": text}]))
        else:
            found.append(await service.encoder.count_text_ids(text, add_bos=asked.add_bos))
    return found
