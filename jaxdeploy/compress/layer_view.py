"""What a method sees of the layer that it quantises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import jax

from jaxdeploy.compress.grid import ChannelRounded, Grid, Rounded


@dataclass(frozen=True, eq=False)
class Inputs:
    """Statistics of a linear's inputs over the calibration tokens; all float32.

    ``tokens`` is the number of tokens; data-free runs have 0 and stand-ins for the rest.
    ``mean_abs`` [K] is the mean of |x|.
    ``peak`` [K] is the largest |x|.
    ``sample`` [T, K] are the inputs of T of the tokens, evenly taken.
    ``gram`` [K, K] is the mean of x xᵀ, or ``None`` if the method does not need it.
    ``unseen`` [U, K] are inputs from sequences that no other field counts, for testing the result of a search, or
    ``None`` if there are too few sequences.
    """

    tokens: int
    mean_abs: jax.Array
    peak: jax.Array
    sample: jax.Array
    gram: jax.Array | None = None
    unseen: jax.Array | None = None


class Fold(Protocol):
    """Linears whose inputs can be scaled, because the norm or linear that produces them can undo it."""

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears with these inputs."""
        ...

    def tie(self, values: jax.Array) -> jax.Array:
        """Pool ``values`` [K] over inputs that must share a factor, e.g. those fed by one value head."""
        ...

    def apply(self, factors: jax.Array) -> None:
        """Multiply the rows of the linears by ``factors`` [K] and divide by them what produces its inputs."""
        ...


class LayerView(Protocol):
    """One decoder layer under quantisation. Weights are [K, N], inputs × outputs."""

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears to quantise, in the order in which they run."""
        ...

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The scalings that leave the layer's outputs as they are, in the order in which the linears run."""
        ...

    def grid(self, name: str) -> Grid:
        """The grid that fits a linear."""
        ...

    def weight(self, name: str) -> jax.Array:
        """A linear's weight float32 [K, N] as it is now: folds applied, and rounded once it is stored."""
        ...

    def inputs(self, name: str) -> Inputs:
        """A linear's inputs, computed with the weights as they are now."""
        ...

    def store(self, name: str, rounded: Rounded | ChannelRounded, note: str = "") -> None:
        """Put ``rounded`` in place of a linear's weight; the report shows ``note``."""
        ...


def inputs_in_order(layer: LayerView, *, sequential: bool) -> Iterator[tuple[str, Inputs]]:
    """Each linear of ``layer`` with its inputs, in the order in which they run.

    ``sequential``: the inputs of a linear are computed when its turn comes, so that they see what was stored before it
    (GPTQ's true-sequential); otherwise all of them up front.
    """
    if sequential:
        yield from ((name, layer.inputs(name)) for name in layer.linears)
    else:
        yield from [(name, layer.inputs(name)) for name in layer.linears]
