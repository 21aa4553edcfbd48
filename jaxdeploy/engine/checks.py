"""What a request must be like, before an engine takes it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from jaxdeploy.errors import ContextLengthError, RequestError, UnknownAdapterError
from jaxdeploy.messages import Request

MAX_LOGPROBS = 20
"""Most alternatives that are reported with a token."""

MAX_BIASES = 256
"""Most tokens with a bias of their own."""


@dataclass(frozen=True)
class RequestLimits:
    """Tokens of a prompt and its reply together, and of the vocabulary."""

    session_len: int
    vocab_size: int

    def check(self, request: Request) -> None:
        """Raise ``ContextLengthError`` or another ``RequestError`` where an engine cannot take ``request``."""
        length = len(request.prompt_token_ids)
        if not length:
            raise RequestError("prompt='' must have at least one token; give some text")
        if length >= self.session_len:
            raise ContextLengthError(
                f"prompt of {length} tokens must be shorter than session_len={self.session_len}; "
                "shorten it, or start with a larger session_len"
            )
        if not all(0 <= token < self.vocab_size for token in request.prompt_token_ids):
            raise RequestError(f"prompt_token_ids must be between 0 and {self.vocab_size - 1}; check the tokenizer")
        if request.timeout is not None and not request.timeout > 0:
            raise RequestError(f"timeout={request.timeout} must be above 0; give a number of seconds, or none")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(request.sampling, name)
            if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
                raise RequestError(f"{name}={wanted} must be between 0 and {MAX_LOGPROBS}; ask for fewer")
        self._check_bias(request.sampling.logit_bias)

    def _check_bias(self, bias: tuple[tuple[int, float], ...]) -> None:
        if len(bias) > MAX_BIASES:
            raise RequestError(f"logit_bias has {len(bias)} tokens, {MAX_BIASES} at most; name fewer")
        for token, value in bias:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"logit_bias: token {token} must be between 0 and {self.vocab_size - 1}; check it")
            if not math.isfinite(value):
                raise RequestError(f"logit_bias: {value} for token {token} must be finite; -100 forbids it")


def check_name(request: Request, used: bool) -> None:
    """Raise ``RequestError`` if another request has the name of this one."""
    if used:
        raise RequestError(f"request_id={request.request_id} is in use; choose another")


def check_adapter(name: str, loaded: Collection[str]) -> None:
    """Raise ``UnknownAdapterError`` unless the adapter is among those that are ``loaded``."""
    if name not in loaded:
        known = f"choose one of {', '.join(loaded)}" if loaded else "none is loaded; load it first"
        raise UnknownAdapterError(f"adapter={name!r:.80} is not loaded; {known}")
