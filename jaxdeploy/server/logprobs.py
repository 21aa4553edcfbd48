"""Log-probabilities of tokens, with the texts of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdeploy.messages import TokenLogprob
from jaxdeploy.server.protocol.chat import ChoiceLogprobs, ChosenLogprob, LogprobOf
from jaxdeploy.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text of a token; special tokens have their names."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> ChoiceLogprobs:
    """Return log-probabilities in the form of ``/v1/chat/completions``."""

    def one(token_id: int, logprob: float) -> dict[str, object]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return ChoiceLogprobs(
        content=[
            ChosenLogprob.model_validate(
                {
                    **one(token.token_id, token.logprob),
                    "top_logprobs": [LogprobOf.model_validate(one(*top)) for top in token.top],
                }
            )
            for token in tokens
        ]
    )
