"""One sequence on its way through the engine: its tokens, its place on the device, and its drafts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.adapters import Adapter
from jaxdeploy.engine.scheduling.blocks import Block, Node, Start
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import NO_SPECULATION, FinishReason, Request, SamplingParams, SpeculationCounts


class MatcherLike(Protocol):
    """The part of the grammar matcher that the engine uses."""

    def allow(self, words: Any, drafts: tuple[int, ...] = ()) -> None:
        """Clear the bits of tokens that cannot come next; further rows are for positions after each of ``drafts``."""
        ...

    def take(self, token_id: int) -> bool:
        """Advance by ``token_id``. Returns whether the reply still follows the grammar."""
        ...


@dataclass(eq=False, slots=True)
class Placement:
    """Where a sequence is on the device, and how much of it has been computed there."""

    slot: int | None = None
    """Row of the token buffer while the sequence runs. ``RunningSequences`` sets it."""
    blocks: list[Block] = field(default_factory=list)
    """KV blocks of the first tokens. A running sequence holds them. While it waits, others may take them."""
    block_table: array[int] = field(default_factory=lambda: array("i"))
    """int32 indices of ``blocks``."""
    cached_nodes: list[Node] = field(default_factory=list)
    """Nodes under which other sequences find its full blocks. They may name equal blocks of another sequence."""
    computed: int = 0
    """Tokens whose keys and values are in ``blocks``, or will be after the scheduled steps."""
    prefill_end: int = 0
    """Tokens that were known when the sequence last got its slot: it prefills up to there and then decodes."""
    cached_tokens: int = 0
    """Prompt tokens that were in the cache when the sequence first ran."""

    def add_blocks(self, blocks: list[Block]) -> None:
        """Append blocks, which the caller holds, to those of the sequence."""
        self.blocks += blocks
        self.block_table.extend(block.index for block in blocks)

    def clear_blocks(self) -> None:
        """Drop the references to all blocks. The caller has given them back, or keeps them."""
        self.blocks = []
        self.block_table = array("i")


@dataclass(eq=False, slots=True)
class DraftState:
    """Speculative decoding of one sequence."""

    computed: int = 0
    """Tokens whose keys and values a draft model has in the same blocks."""
    unverified: bool = False
    """Whether tokens in flight depend on drafts. They hold only up to the first wrong one."""
    counts: SpeculationCounts = NO_SPECULATION
    """Drafts proposed and accepted so far."""


@dataclass(eq=False)
class Sequence:
    """A request, its tokens, and the state that the engine keeps for it."""

    request: Request
    arrival: int = 0
    """Counts up from sequence to sequence. ``WaitingQueue`` sets it."""
    deadline: float | None = None
    """Time on the monotonic clock, in seconds, at which the sequence is aborted."""
    token_ids: list[int] = field(init=False)
    """Tokens of prompt and reply that the host knows."""
    prompt_length: int = field(init=False)
    """Tokens of the prompt."""
    max_len: int = field(init=False)
    """Maximum tokens of prompt and reply."""
    in_flight: int = 0
    """Tokens that scheduled steps sample and that the host does not know yet."""
    placement: Placement = field(default_factory=Placement)
    """Slot, blocks and computed tokens."""
    draft: DraftState = field(default_factory=DraftState)
    """Speculative decoding."""
    settings: array[int] | None = None
    """Packed fields that are the same in all steps, once they have been made."""
    matcher: MatcherLike | None = None
    """Follows the reply through its grammar, if it has one."""
    adapter: Adapter | None = None
    """LoRA adapter, ``None`` for the model itself."""
    prompt_outputs: PromptOutputs = field(init=False)
    """What the steps that compute the prompt still have to return for it."""
    finish_reason: FinishReason | None = None
    """Why the sequence ended, ``None`` until it does."""
    fault: Exception | None = None
    """Cause of ``FinishReason.ERROR``."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_length = len(self.token_ids)
        self.max_len = self.prompt_length + self.sampling.max_new_tokens
        self.prompt_outputs = _prompt_outputs(self.request)
        self._always_sampler = _needs_sampler(self.sampling)

    @property
    def start(self) -> Start:
        """The start under which its cached blocks are found."""
        return self.request.cache_salt, None if self.adapter is None else self.adapter.root

    @property
    def request_id(self) -> str:
        """Name of the request; unique in an engine."""
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.sampling

    @property
    def length(self) -> int:
        """Number of tokens, including those in flight."""
        return len(self.token_ids) + self.in_flight

    @property
    def generated(self) -> int:
        """Number of known tokens after the prompt."""
        return len(self.token_ids) - self.prompt_length

    @property
    def prefilling(self) -> bool:
        """Whether tokens known when it got its slot are still to be computed."""
        return self.placement.computed < self.placement.prefill_end

    @property
    def needs_sampler(self) -> bool:
        """Whether choosing its next token takes more than the largest logit."""
        return self._always_sampler or self.generated < self.sampling.min_new_tokens

    @property
    def needs_host_sync(self) -> bool:
        """Whether the host must see the last token before the next one can be sampled."""
        return (
            self.draft.unverified
            or self.matcher is not None
            or any(len(words) > 1 for words in self.sampling.bad_token_sequences)
        )

    def resolve_drafts(self) -> None:
        """Forget what was computed after a wrong draft, once the tokens in flight have arrived."""
        if self.draft.unverified:
            self.draft.unverified = False
            self.in_flight = 0
            self.placement.computed = len(self.token_ids) - 1

    def append(self, token_id: int) -> None:
        """Add a token that was in flight, and set ``finish_reason`` if it ends the sequence."""
        self.in_flight -= 1
        self.token_ids.append(token_id)
        sampling = self.sampling
        if self.matcher is not None and not self.matcher.take(token_id):
            self.finish_reason = FinishReason.ERROR
            self.fault = RequestError("response_format cannot be followed with this vocabulary; simplify it")
        elif self.generated >= sampling.min_new_tokens and token_id in sampling.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = FinishReason.LENGTH


def _prompt_outputs(request: Request) -> PromptOutputs:
    if request.sampling.prompt_logprobs is not None:
        return PromptOutputs.LOGPROBS
    return PromptOutputs.HIDDEN if request.embed else PromptOutputs.NONE


def _needs_sampler(sampling: SamplingParams) -> bool:
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    return (
        not sampling.greedy
        or penalties != (1.0, 0.0, 0.0)
        or sampling.logprobs is not None
        or bool(sampling.bad_token_sequences)
        or bool(sampling.logit_bias)
        or sampling.grammar is not None
    )
