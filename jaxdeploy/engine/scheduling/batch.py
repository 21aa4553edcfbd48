"""What the scheduler hands to the device: chunks of sequences that make up one step."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdeploy.engine.scheduling.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a sequence that one step computes."""

    sequence: Sequence
    start: int
    """Position of the first token."""
    length: int
    """Number of tokens, drafts included."""
    drafts: tuple[int, ...] = ()
    """The last tokens of the chunk, if they are drafts."""

    @property
    def end(self) -> int:
        """Position after the last token. If the chunk samples, the last sampled token goes there."""
        return self.start + self.length

    @property
    def first_new(self) -> int:
        """Position of the first sampled token.

        A prompt yields one sampled token. A decode chunk and a chunk with drafts yield one per position.
        """
        return self.start + 1 if self.drafts or self.start >= self.sequence.placement.prefill_end else self.end

    @property
    def verifies(self) -> bool:
        """Whether the sample after each draft counts: the sequence does not have the drafts as tokens.

        A draft model computes accepted tokens like drafts. Then only the sample after the last one is new.
        """
        return bool(self.drafts) and self.start + 1 >= len(self.sequence.token_ids)

    @property
    def samples(self) -> bool:
        """Whether the chunk completes the prefill or comes after it, so that it yields a token."""
        return self.end >= self.sequence.placement.prefill_end


@dataclass(frozen=True)
class PromptPlace:
    """The place in a step of a chunk whose prompt has outputs."""

    chunk: Chunk
    prompt: int
    """Index among the prompts of the step."""
    first_token: int
    """Index of its first token among the prompt tokens of the step."""


@dataclass(frozen=True)
class ScheduledBatch:
    """The chunks of one step."""

    decodes: tuple[Chunk, ...] = ()
    """Sequences that decode."""
    chunks: tuple[Chunk, ...] = ()
    """Chunks of prompts."""
    admitted: tuple[Sequence, ...] = ()
    """Sequences that got their slot for this step."""
    repeats: int = 1
    """Tokens that each decode yields, one after the other."""
    samples: bool = True
    """Whether the step yields tokens. It does not if the sequences have them, as for a draft model that catches up."""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def max_drafts(self) -> int:
        """Most drafts of any sequence."""
        return max([len(chunk.drafts) for chunk in self.decodes], default=0)
