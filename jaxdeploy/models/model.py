"""What a forward pass returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from pallas_kernels.kv_pool import Pool

Pools = Sequence[Pool | None]
"""The KV pool of each layer; ``None`` without a cache."""


class Hidden(NamedTuple):
    """Hidden states of a step.

    Attributes:
        states: normed, [T, D], or [B, D] of the selected tokens.
        pools: the updated pools.
        tapped: the residual stream [T, D] before each of the tapped layers, in the order of ``taps``.
    """

    states: jax.Array
    pools: Pools
    tapped: tuple[jax.Array, ...] = ()
