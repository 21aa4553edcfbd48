"""Tokens from texts and back: ``/tokenize``, ``/detokenize``, ``/v1/encode`` and ``/tokenizer_info``."""

from __future__ import annotations

from fastapi import APIRouter

from jaxdeploy.server.dependencies import Model
from jaxdeploy.server.protocol.tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    EncodeReply,
    EncodeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfo,
)
from jaxdeploy.server.served import Served, apart

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(asked: TokenizeRequest, served: Model) -> TokenizeReply:
    """Token ids of a text, or of a conversation as the model would read it."""
    served.check_model(asked.model)
    tokenizer = served.tokenizer
    if asked.messages is not None:
        messages = [message.model_dump() for message in asked.messages]
        ending = {name: getattr(asked, name) for name in ("add_generation_prompt", "continue_final_message")}
        ids = list(await served.chat_ids(messages, **(asked.chat_template_kwargs or {}), **ending))
    else:
        text = asked.prompt or ""
        ids = await apart(lambda: tokenizer.encode(text, add_bos=asked.add_special_tokens))
    texts = [tokenizer.id_to_token(token_id) for token_id in ids] if asked.return_token_strs else None
    return TokenizeReply(count=len(ids), max_model_len=served.session_len, tokens=ids, token_strs=texts)


@router.post("/detokenize")
async def detokenize(asked: DetokenizeRequest, served: Model) -> DetokenizeReply:
    """The text of token ids."""
    served.check_model(asked.model)
    text = await apart(lambda: served.tokenizer.decode(asked.tokens, skip_special_tokens=False))
    return DetokenizeReply(prompt=text)


@router.post("/v1/encode")
async def encode(asked: EncodeRequest, served: Model) -> EncodeReply:
    """Token ids of a text or of several, as LMDeploy gives them."""
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    found = [await _encoded(served, asked, text) for text in texts]
    lengths = [len(ids) for ids in found]
    if isinstance(asked.input, str):
        return EncodeReply(input_ids=found[0], length=lengths[0])
    return EncodeReply(input_ids=found, length=lengths)


@router.get("/tokenizer_info")
async def tokenizer_info(served: Model) -> TokenizerInfo:
    """What there is to know of the tokenizer."""
    tokenizer = served.tokenizer
    return TokenizerInfo(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        special_tokens=dict(tokenizer.special_tokens),
        chat_template=tokenizer.chat_template,
        max_model_len=served.session_len,
    )


async def _encoded(served: Served, asked: EncodeRequest, text: str) -> list[int]:
    if asked.do_preprocess:
        return list(await served.chat_ids([{"role": "user", "content": text}]))
    return await apart(lambda: served.tokenizer.encode(text, add_bos=asked.add_bos))
