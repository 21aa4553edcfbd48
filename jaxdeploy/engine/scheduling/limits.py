"""Sizes that bound every batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that every batch respects."""

    block_size: int
    """Tokens in a KV block."""
    max_batch_size: int
    """Maximum number of running sequences."""
    max_prefill_tokens: int
    """Maximum prompt tokens of a step without decodes."""
    max_mixed_tokens: int
    """Maximum tokens of a step with decodes and prompts. It bounds the time between tokens of a reply."""
    row_length: int
    """Tokens in a row of a prompt chunk. Chunks cost whole rows."""
    session_len: int
    """Maximum tokens of a sequence."""
    decode_steps: int = 1
    """Tokens that a step decodes per sequence while no sequence waits or prefills."""

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that ``tokens`` tokens take."""
        return -(-tokens // self.block_size)
