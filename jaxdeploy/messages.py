"""The values that cross layers: a request on its way in, tokens and text on their way out. Plain and picklable."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from jaxdeploy.errors import JaxdeployError


class FinishReason(StrEnum):
    """Why a sequence ended; OpenAI's and LMDeploy's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


MIN_TEMPERATURE = 1e-5
"""Below it logits divided by the temperature may overflow, and a draw is the most likely token anyway."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, in token ids only: texts were translated before a request reaches the engine.

    A ``temperature`` below ``MIN_TEMPERATURE`` is greedy. ``top_k`` 0 and ``top_p`` 1.0 keep every token.
    ``logprobs`` is the number of
    alternatives reported with each token; ``None`` reports nothing, 0 only the chosen token's own; ``prompt_logprobs``
    is the same for the tokens of the prompt. ``grammar`` is what the reply must follow, in llguidance's form.
    ``logit_bias`` is added to the logits of these tokens. ``num_speculative_tokens`` are drafted at a time, at most;
    0 drafts none, ``None`` as many as the engine does.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    num_speculative_tokens: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1


@dataclass(frozen=True)
class TextOptions:
    """How the tokens of a reply become text.

    stop_words: texts that end the reply.
    skip_special_tokens: whether special tokens are left out of the text.
    spaces_between_special_tokens: whether special tokens in the text are separated by spaces.
    include_stop: whether the text keeps the stop word.
    """

    stop_words: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop: bool = False


@dataclass(frozen=True)
class Request:
    """One sequence to generate, from the API to the scheduler. ``n`` alternatives are ``n`` requests.

    request_id: name of the request; no other unfinished request has it.
    prompt_token_ids: the prompt.
    sampling: how tokens are chosen. Alternatives differ in their seed.
    priority: requests with a lower value are scheduled first.
    tenant: requests of equal priority share the engine fairly between tenants.
    timeout: seconds after which the request is aborted; ``None``: no limit.
    session_id: a conversation. The cached blocks of its last request are reused.
    embed: whether the hidden states of the prompt are returned.
    adapter: name of a loaded LoRA adapter; ``None``: the model itself.
    cache_salt: only prompts with the same salt share cached blocks.
    text: how tokens become text. The engine does not read it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    tenant: str = ""
    timeout: float | None = None
    session_id: str | None = None
    embed: bool = False
    adapter: str | None = None
    cache_salt: str = ""
    text: TextOptions = field(default_factory=TextOptions)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the most likely ones beside it (natural logarithm)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptResult:
    """Outputs for a prompt.

    mean: mean of the normed hidden states of its tokens, D numbers.
    last: hidden state of its last token, D numbers.
    logprobs: log-probabilities of its tokens except the first, if the request asked for them.
    """

    mean: tuple[float, ...]
    last: tuple[float, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class SpeculationCounts(NamedTuple):
    """How speculative decoding went: ``rounds`` in which ``drafts`` were verified, of which ``accepted`` were right."""

    rounds: int = 0
    drafts: int = 0
    accepted: int = 0

    def plus(self, drafts: int, accepted: int) -> SpeculationCounts:
        """After one round more."""
        return SpeculationCounts(self.rounds + 1, self.drafts + drafts, self.accepted + accepted)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were right."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def mean_length(self) -> float:
        """Tokens that a round gave: drafts that were right, and the one behind them."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0


NO_SPECULATION = SpeculationCounts()


@dataclass(frozen=True)
class StepOutput:
    """What one engine step produced for one request: its new token, or only a finish reason.

    ``cached_tokens`` of its prompt did not have to be computed. ``prompt`` comes with the first token, where it was
    asked for. ``speculation`` counts the drafts of the whole reply, up to here. ``error`` comes with
    ``FinishReason.ERROR``: why the request ended. It must pickle.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    prompt: PromptResult | None = None
    speculation: SpeculationCounts = NO_SPECULATION
    error: JaxdeployError | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TextOutput:
    """What one step added to a reply.

    request_id: the request.
    text: new text.
    token_ids: new tokens.
    logprobs: log-probabilities of the new tokens, if the request asked for them.
    finish_reason: why the reply ended; ``None`` if it has not.
    cached_tokens: prompt tokens that were found in the cache.
    stop_word: the text that ended the reply, if one did.
    prompt: hidden states and log-probabilities of the prompt, if asked for; in one output only.
    speculation: counts of drafts since the reply began.
    error: why the request failed, with ``FinishReason.ERROR``.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    stop_word: str | None = None
    prompt: PromptResult | None = None
    speculation: SpeculationCounts = NO_SPECULATION
    error: JaxdeployError | None = field(default=None, compare=False)
