"""The sizes of an engine."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Limits:
    """What an engine is sized for, with defaults filled in.

    Attributes:
        session_len: tokens of a sequence.
        max_batch_size: sequences in a step, and rows of the token buffer.
        max_prefill_tokens: prompt tokens of a step without decodes.
        max_mixed_tokens: prompt tokens of a step with decodes.
        decode_steps: tokens that one launch decodes for each sequence.
        dtype: of weights and activations.
    """

    session_len: int
    max_batch_size: int
    max_prefill_tokens: int
    max_mixed_tokens: int
    decode_steps: int
    dtype: jnp.dtype
