"""Features that a model makes for its EAGLE-3 head, and who may donate their array."""

from __future__ import annotations

from typing import NamedTuple

import jax


class FeatureTap(NamedTuple):
    """How the steps of a model make features for its head.

    Attributes:
        taps: the layers before which the residual stream is taken.
        fuse: [taps · D, D], the matrix that makes features of it.
    """

    taps: tuple[int, ...]
    fuse: jax.Array


class Features:
    """Owner of the features [P, S, D] of tokens, which are in the blocks of their sequences.

    The runners of the model and of the head both write them. A runner borrows the array for each launch, which donates
    it, and gives back the array that the launch returned. One thread makes all launches and the device runs them in
    their order, so each launch reads what the one before has written, whichever runner made it.
    """

    def __init__(self, array: jax.Array) -> None:
        self._array = array

    def borrow(self) -> jax.Array:
        """Return the array for a launch. After a launch that failed it is deleted, or it is still the one to borrow."""
        return self._array

    def give_back(self, array: jax.Array) -> None:
        """Take over the array that a launch returned in place of the borrowed one."""
        self._array = array
