"""What every layout on disk stands for: integers and their scales, outputs first, as checkpoints order them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a module of a checkpoint has: its shape, and whether integers ("i") or floats ("f") are in it.

    ``optional``: the module is whole without it.
    """

    shape: tuple[int, ...]
    kind: Literal["i", "f"]
    optional: bool = False


@dataclass(frozen=True, eq=False)
class GroupQuantized:
    """A weight of few bits, ``(q - zero) · scale``, for float activations (W4A16, W3A16).

    ``q`` uint8 [N, K], 0 … 2^bits − 1; ``scales`` floats [N, G], of the dtype in the file; ``zeros`` uint8 [N, G],
    0 … 2^bits; ``groups`` int32 [K] is the group of each input (GPTQ's act-order), ``None`` where input k is in group
    k // (K / G).
    """

    q: Array
    scales: Array
    zeros: Array
    bits: int
    groups: Array | None = None

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights."""
        return 1 << (self.bits - 1)

    def value(self) -> Array:
        """The weight, float32 [N, K]."""
        scales, zeros = (per_group.astype(np.float32) for per_group in (self.scales, self.zeros))
        weight = self.q.astype(np.float32)
        if self.groups is not None:
            weight -= zeros[:, self.groups]
            weight *= scales[:, self.groups]
            return weight
        grouped = weight.reshape(*scales.shape, -1)
        grouped -= zeros[..., None]
        grouped *= scales[..., None]
        return weight


@dataclass(frozen=True, eq=False)
class ChannelQuantized:
    """A weight in int8, ``q · scale``, for activations that are rounded to int8 token by token (W8A8).

    ``q`` int8 [N, K], ``scales`` float32 [N].
    """

    q: Array
    scales: Array

    def value(self) -> Array:
        """The weight, float32 [N, K]."""
        weight: Array = self.q.astype(np.float32) * self.scales.astype(np.float32)[:, None]
        return weight
