"""What a step returns for the prompts that it computes, in addition to sampled tokens."""

from __future__ import annotations

from enum import IntEnum


class PromptOutputs(IntEnum):
    """How much a step returns for a prompt. A larger value includes the smaller ones."""

    NONE = 0
    HIDDEN = 1
    """Hidden states."""
    LOGPROBS = 2
    """Hidden states, and the log-probability of every prompt token."""
