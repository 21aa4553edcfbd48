"""One sequence on its way through the engine: its tokens, and what of it is in the KV cache."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxdeploy.engine.prompt_outputs import PromptOutputs
from jaxdeploy.engine.scheduling.adapters import Adapter, Root
from jaxdeploy.errors import RequestError
from jaxdeploy.messages import NO_SPECULATION, FinishReason, Request, SamplingParams, SpeculationCounts


class MatcherLike(Protocol):
    """What is needed of a ``jaxdeploy.engine.grammar.Matcher``."""

    def allow(self, words: Any, drafts: tuple[int, ...] = ()) -> None:
        """Clear the bits of tokens that cannot come next; in further rows, behind so many of ``drafts``."""
        ...

    def take(self, token_id: int) -> bool:
        """The reply goes on with ``token_id``; whether it still follows."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """A physical KV block as somebody holds it; ``stamp`` tells whether it still has what they put there."""

    index: int
    stamp: int


Start = tuple[str, Root | None]
"""What cached blocks depend on before their tokens: the request's salt, and the root of its adapter."""


@dataclass(eq=False, slots=True)
class Node:
    """A whole block of tokens behind those of ``before``, and where its keys and values are kept.

    Before the first stands the sequence's ``Start``. ``block`` on the device, ``host_block`` in host memory,
    both or, in the end, neither.
    """

    before: Node | Start = field(repr=False)
    tokens: tuple[int, ...]
    block: Block | None = None
    host_block: int | None = None


@dataclass(eq=False)
class Sequence:
    """Tokens known so far, and how far they have been computed.

    ``longest`` is the most tokens that it may have. ``arrival`` counts up from sequence to sequence; ``deadline`` is on
    the monotonic clock, in seconds. ``computed`` tokens have keys and values in ``blocks``, or get them in a step that
    has been scheduled; ``in_flight`` tokens are sampled by such steps and not yet known here, ``unsure`` where they
    hold only as far as drafts are right. ``prefill_end`` tokens were known when the sequence last began to run: up to
    there it is prefilling, beyond it decodes. ``slot`` is its row on the device while it runs, ``block_table`` the
    int32 indices of its blocks. ``cached`` tokens of the prompt were in the cache when it first ran. ``noted`` is how
    others find its tokens, in its own blocks or in such as had the same before (``PrefixCache``). ``settings`` is what
    a step takes of it that never changes, once that is laid out. ``matcher`` follows the reply through its grammar, if
    it has one. ``fault`` is why it ended with ``FinishReason.ERROR``. ``prompt_outputs``: what its prompt
    still returns.
    A draft model has keys and values of ``drafted`` tokens in the same blocks; ``speculation`` counts drafts. It runs
    with ``adapter``, ``None``: the model itself.
    """

    request: Request
    arrival: int = 0
    deadline: float | None = None
    token_ids: list[int] = field(init=False)
    prompt_length: int = field(init=False)
    longest: int = field(init=False)
    computed: int = 0
    in_flight: int = 0
    unsure: bool = False
    prefill_end: int = 0
    slot: int | None = None
    blocks: list[Block] = field(default_factory=list)
    block_table: array[int] = field(default_factory=lambda: array("i"))
    cached: int = 0
    settings: array[int] | None = None
    matcher: MatcherLike | None = None
    noted: list[Node] = field(default_factory=list)
    drafted: int = 0
    speculation: SpeculationCounts = NO_SPECULATION
    finish_reason: FinishReason | None = None
    fault: Exception | None = None
    adapter: Adapter | None = None
    prompt_outputs: PromptOutputs = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_length = len(self.token_ids)
        self.longest = self.prompt_length + self.sampling.max_new_tokens
        self.prompt_outputs = _prompt_outputs(self.request)
        self._always_sampler = _needs_sampler(self.sampling)

    @property
    def start(self) -> Start:
        """Its cached blocks are found from here."""
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
        """Its tokens, those in flight among them."""
        return len(self.token_ids) + self.in_flight

    @property
    def generated(self) -> int:
        """Tokens produced so far, and known."""
        return len(self.token_ids) - self.prompt_length

    @property
    def prefilling(self) -> bool:
        """Whether tokens known at the start of its run are still to be computed."""
        return self.computed < self.prefill_end

    @property
    def needs_sampler(self) -> bool:
        """Whether choosing its next token takes more than the largest logit."""
        return self._always_sampler or self.generated < self.sampling.min_new_tokens

    @property
    def reads_tokens(self) -> bool:
        """Whether its next token cannot be chosen before the host has seen the last."""
        return (
            self.unsure
            or self.matcher is not None
            or any(len(words) > 1 for words in self.sampling.bad_token_sequences)
        )

    def hold(self, blocks: list[Block]) -> None:
        """Have ``blocks`` behind those that it has."""
        self.blocks += blocks
        self.block_table.extend(block.index for block in blocks)

    def hold_none(self) -> None:
        """Have no blocks any more."""
        self.blocks, self.block_table = [], array("i")

    def settle(self) -> None:
        """What was in flight has arrived: what goes on from wrong drafts has never been computed."""
        if self.unsure:
            self.unsure, self.in_flight = False, 0
            self.computed = len(self.token_ids) - 1

    def append(self, token_id: int) -> None:
        """Take a token that was in flight and note whether it ends the sequence."""
        self.in_flight -= 1
        self.token_ids.append(token_id)
        sampling = self.sampling
        if self.matcher is not None and not self.matcher.take(token_id):
            self.finish_reason = FinishReason.ERROR
            self.fault = RequestError("response_format cannot be followed with this vocabulary; simplify it")
        elif self.generated >= sampling.min_new_tokens and token_id in sampling.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.longest:
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
