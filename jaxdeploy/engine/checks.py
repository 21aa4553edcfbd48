"""What a request must be like, before an engine takes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jaxdeploy.errors import ContextLengthError, RequestError
from jaxdeploy.messages import Request

MAX_LOGPROBS = 20
"""Most alternatives that are reported with a token."""

MAX_BIASES = 256
"""Most tokens with a bias of their own."""


MAX_PENALTY = 1e6
"""Largest penalty, and the inverse of the smallest ``repetition_penalty``."""

MAX_INT32 = 2**31 - 1
"""Largest integer of a field that a step reads on the device."""

MAX_FLOAT = 1e30
"""Largest number of such a field: products with logits stay finite in float32."""

_INTEGERS = {
    "top_k": (0, MAX_INT32),
    "seed": (None, None),
    "max_new_tokens": (1, None),
    "min_new_tokens": (0, None),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "num_speculative_tokens": (0, None),
}
"""Integer fields of ``SamplingParams``: the least and the largest value, ``None`` for no bound."""

_NUMBERS = {
    "temperature": (0.0, MAX_FLOAT),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1 / MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
}
"""The same for fields that are real numbers."""

_OPTIONAL = ("logprobs", "prompt_logprobs", "num_speculative_tokens")


@dataclass(frozen=True)
class RequestLimits:
    """What an engine accepts.

    ``session_len``: tokens of a prompt and its reply together.
    ``vocab_size``: token ids are below it.
    """

    session_len: int
    vocab_size: int

    def check(self, request: Request) -> None:
        """Raise ``ContextLengthError`` or another ``RequestError`` where an engine cannot take ``request``.

        Types are checked too: a value of the wrong type would fail inside a step, which other requests share.
        """
        self._check_prompt(request.prompt_token_ids)
        _check_types(request)
        if request.timeout is not None:
            _check_number("timeout", request.timeout, -MAX_FLOAT, MAX_FLOAT)
            if request.timeout <= 0:
                raise RequestError(f"timeout={request.timeout} must be above 0; give a number of seconds, or none")
        sampling = request.sampling
        for name, (least, most) in _INTEGERS.items():
            if not (name in _OPTIONAL and getattr(sampling, name) is None):
                _check_integer(name, getattr(sampling, name), least, most)
        for name, (low, high) in _NUMBERS.items():
            _check_number(name, getattr(sampling, name), low, high)
        _check_ids("stop_token_ids", sampling.stop_token_ids)
        for ids in sampling.bad_token_sequences:
            _check_ids("bad_token_sequences", ids)
            if not ids:
                raise RequestError("bad_token_sequences has an empty sequence; leave it out")
        self._check_bias(sampling.logit_bias)

    def _check_prompt(self, ids: tuple[int, ...]) -> None:
        length = len(ids)
        if not length:
            raise RequestError("prompt='' must have at least one token; give some text")
        if length >= self.session_len:
            raise ContextLengthError(
                f"prompt of {length} tokens must be shorter than session_len={self.session_len}; "
                "shorten it, or start with a larger session_len"
            )
        _check_ids("prompt_token_ids", ids)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise RequestError(f"prompt_token_ids must be between 0 and {self.vocab_size - 1}; check the tokenizer")

    def _check_bias(self, bias: tuple[tuple[int, float], ...]) -> None:
        if len(bias) > MAX_BIASES:
            raise RequestError(f"logit_bias has {len(bias)} tokens, {MAX_BIASES} at most; name fewer")
        _check_ids("logit_bias", [token for token, _ in bias])
        for token, value in bias:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"logit_bias: token {token} must be between 0 and {self.vocab_size - 1}; check it")
            if not isinstance(value, int | float) or not -MAX_FLOAT <= value <= MAX_FLOAT:
                raise RequestError(f"logit_bias: {value!r:.60} for token {token} must be finite; -100 forbids it")


def _check_types(request: Request) -> None:
    texts = {"request_id": request.request_id, "tenant": request.tenant}
    optional = {
        "session_id": request.session_id,
        "adapter": request.adapter,
        "grammar": request.sampling.grammar,
    }
    texts |= {name: value for name, value in optional.items() if value is not None}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise RequestError(f"{name}={value!r:.60} must be a text; correct it")
    _check_integer("priority", request.priority, None, None)


def _check_integer(name: str, value: object, least: int | None, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}={value!r:.60} must be an integer; correct it")
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        advice = "ask for fewer" if name.endswith("logprobs") else "correct it"
        raise RequestError(f"{name}={value!r:.60} must be {bounds}; {advice}")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    """NaN is in no range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name}={value!r:.60} must be a number; correct it")
    if not least <= value <= most:
        raise RequestError(f"{name}={value!r:.60} must be between {least:g} and {most:g}; correct it")


def _check_ids(name: str, ids: Collection[object]) -> None:
    if not set(map(type, ids)) <= {int}:
        raise RequestError(f"{name} must have integers only; give token ids")


def check_name(request: Request, used: bool) -> None:
    """Raise ``RequestError`` if another request has the name of this one."""
    if used:
        raise RequestError(f"request_id={request.request_id} is in use; choose another")
