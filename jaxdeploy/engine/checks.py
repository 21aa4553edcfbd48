"""What a request must be like, before an engine takes it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdeploy.errors import ContextLengthError, RequestError
from jaxdeploy.messages import Request

MAX_LOGPROBS = 20
"""Most alternatives that are reported with a token."""


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
        wanted = request.sampling.logprobs
        if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
            raise RequestError(f"logprobs={wanted} must be between 0 and {MAX_LOGPROBS}; ask for fewer")


def check_name(request: Request, used: bool) -> None:
    """Raise ``RequestError`` if another request has the name of this one."""
    if used:
        raise RequestError(f"request_id={request.request_id} is in use; choose another")
