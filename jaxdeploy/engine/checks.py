"""What a request must be like, before an engine takes it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from jaxdeploy.errors import ContextLengthError, RequestError
from jaxdeploy.files.stored import shown
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

_INTEGERS: tuple[tuple[str, float, float], ...] = (
    ("top_k", 0, MAX_INT32),
    ("seed", -math.inf, math.inf),
    ("max_new_tokens", 1, math.inf),
    ("min_new_tokens", 0, math.inf),
)
"""Integer fields of ``SamplingParams`` with their smallest and largest values."""

_OPTIONAL_INTEGERS: tuple[tuple[str, float, float], ...] = (
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("num_speculative_tokens", 0, math.inf),
)
"""The same for fields that may be ``None``."""

_ONLY_INTEGERS = frozenset({int})
_GROUPS = (tuple, list, set, frozenset)

_NUMBERS = (
    ("temperature", 0.0, MAX_FLOAT),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1 / MAX_PENALTY, MAX_PENALTY),
    ("presence_penalty", -MAX_PENALTY, MAX_PENALTY),
    ("frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
)
"""The same for fields that are real numbers."""


@dataclass(frozen=True)
class RequestLimits:
    """What an engine accepts.

    ``session_len``: tokens of a prompt and its reply together.
    ``vocab_size``: token ids are below it.
    """

    session_len: int
    vocab_size: int

    def check(self, request: Request) -> None:
        """Raise ``ContextLengthError`` or another ``RequestError`` if an engine cannot take ``request``.

        Types are checked too: a value of the wrong type would fail inside a step, which other requests share. The
        check runs in the server and in the engine's process. It is a few comparisons; functions are called for the
        values that fail them, and raise.
        """
        if type(request.prompt_token_ids) not in _GROUPS:
            _check_group("prompt_token_ids", request.prompt_token_ids)
        self._check_prompt(request.prompt_token_ids)
        sampling = request.sampling
        for name, value, optional in (
            ("request_id", request.request_id, False),
            ("tenant", request.tenant, False),
            ("session_id", request.session_id, True),
            ("adapter", request.adapter, True),
            ("grammar", sampling.grammar, True),
        ):
            if not (isinstance(value, str) or (optional and value is None)):
                raise RequestError(f"{name}={shown(value)} must be a text; correct it")
        if type(request.priority) is not int:
            _check_integer("priority", request.priority, -math.inf, math.inf)
        if request.timeout is not None:
            _check_timeout(request.timeout)
        for name, low, high in _INTEGERS:
            value = getattr(sampling, name)
            if type(value) is not int or not low <= value <= high:
                _check_integer(name, value, low, high)
        for name, low, high in _OPTIONAL_INTEGERS:
            value = getattr(sampling, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                _check_integer(name, value, low, high)
        for name, low, high in _NUMBERS:
            value = getattr(sampling, name)
            if type(value) not in (int, float) or not low <= value <= high:
                _check_number(name, value, low, high)
        stops = sampling.stop_token_ids
        if type(stops) not in _GROUPS or not set(map(type, stops)) <= _ONLY_INTEGERS:
            _check_ids("stop_token_ids", stops)
        if type(sampling.bad_token_sequences) not in _GROUPS:
            _check_group("bad_token_sequences", sampling.bad_token_sequences)
        for ids in sampling.bad_token_sequences:
            _check_ids("bad_token_sequences", ids)
            if not ids:
                raise RequestError("bad_token_sequences has an empty sequence; leave it out")
        if type(sampling.logit_bias) is not tuple or sampling.logit_bias:
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
        if not set(map(type, ids)) <= _ONLY_INTEGERS:
            _check_ids("prompt_token_ids", ids)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise RequestError(f"prompt_token_ids must be between 0 and {self.vocab_size - 1}; check the tokenizer")

    def _check_bias(self, bias: tuple[tuple[int, float], ...]) -> None:
        _check_group("logit_bias", bias)
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in bias):
            raise RequestError("logit_bias must have pairs of a token id and a number; correct it")
        if len(bias) > MAX_BIASES:
            raise RequestError(f"logit_bias has {len(bias)} tokens, {MAX_BIASES} at most; name fewer")
        _check_ids("logit_bias", [token for token, _ in bias])
        for token, value in bias:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"logit_bias: token {token} must be between 0 and {self.vocab_size - 1}; check it")
            if not isinstance(value, int | float) or not -MAX_FLOAT <= value <= MAX_FLOAT:
                raise RequestError(f"logit_bias: {shown(value)} for token {token} must be finite; -100 forbids it")


def _check_timeout(timeout: float) -> None:
    _check_number("timeout", timeout, -MAX_FLOAT, MAX_FLOAT)
    if timeout <= 0:
        raise RequestError(f"timeout={timeout} must be above 0; give a number of seconds, or none")


def _check_integer(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be an integer; correct it")
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        advice = "ask for fewer" if name.endswith("logprobs") else "correct it"
        raise RequestError(f"{name}={shown(value)} must be {bounds}; {advice}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    """NaN is in no range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be a number; correct it")
    if not low <= value <= high:
        raise RequestError(f"{name}={shown(value)} must be between {low:g} and {high:g}; correct it")


def _check_group(name: str, values: object) -> None:
    if not isinstance(values, _GROUPS):
        raise RequestError(f"{name}={shown(values)} must be a tuple or a set; correct it")


def _check_ids(name: str, ids: Collection[object]) -> None:
    _check_group(name, ids)
    if not set(map(type, ids)) <= _ONLY_INTEGERS:
        raise RequestError(f"{name} must have integers only; give token ids")


def check_name(request: Request, used: bool) -> None:
    """Raise ``RequestError`` if another request has the name of this one."""
    if used:
        raise RequestError(f"request_id={request.request_id} is in use; choose another")
