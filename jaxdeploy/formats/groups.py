"""Which inputs share a scale: checked, and in the one form that the rest of the program knows."""

from __future__ import annotations

import numpy as np

from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.formats.quantized import Array


def count_groups(inputs: int, group_size: int) -> int:
    """G; a ``group_size`` of −1 is one group of all ``inputs``. Raises ``UnsupportedModelError``: no divisor."""
    if group_size == -1:
        return 1
    if group_size <= 0 or inputs % group_size:
        raise UnsupportedModelError(
            f"group_size={group_size} must be -1 or divide the {inputs} inputs of every quantised module; "
            "quantise the model with another group size"
        )
    return inputs // group_size


def in_order(inputs: int, count: int) -> Array:
    """The group of each input where groups are neighbours, int32 [K]."""
    return (np.arange(inputs) // (inputs // count)).astype(np.int32)


def read_groups(stored: Array | None, inputs: int, count: int) -> Array | None:
    """The ``groups`` of a ``GroupQuantized`` from what a file has, if it has it.

    Where all inputs have the same number, which some programs write instead of nothing, they are in order too.

    Raises ``CheckpointError``: groups of different sizes, or that are not there.
    """
    if stored is None or (stored == stored[0]).all() or np.array_equal(stored, in_order(inputs, count)):
        return None
    if stored.min() < 0 or stored.max() >= count or (np.bincount(stored, minlength=count) != inputs // count).any():
        raise CheckpointError(
            f"g_idx must give {inputs // count} of {inputs} inputs to each of {count} groups; download the file again"
        )
    return stored.astype(np.int32)
