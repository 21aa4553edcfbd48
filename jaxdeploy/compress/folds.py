"""Scalings of a layer that move size from activations into weights and leave its outputs unchanged.

They follow from the inputs of linear maps, which the block declares (``models.linears``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdeploy.models.linears import LinearInput, LinearSpec, NormInput, Path

Params = MutableMapping[Path, jax.Array]
Rows = Callable[[str, jax.Array], None]
"""Multiplies the rows of a linear map, by name, with factors [K]."""
Rounded = Callable[[Path, jax.Array], jax.Array]
"""A parameter, by path, as it is after it was written to a checkpoint and read again."""


@dataclass(frozen=True)
class NormFold:
    """Norm → linear maps. The norm's scale is divided and ``rounded``; the rows make up for the rounding."""

    linears: tuple[str, ...]
    scale: Path
    params: Params
    rounded: Rounded
    multiply_rows: Rows

    def tie(self, values: jax.Array) -> jax.Array:
        """Every channel has a factor of its own."""
        return values

    def apply(self, factors: jax.Array) -> None:
        """See ``layer_view.Fold``."""
        old = self.params[self.scale]
        new = self.rounded(self.scale, old / factors)
        self.params[self.scale] = new
        for linear in self.linears:
            self.multiply_rows(linear, jnp.where(new == 0, 1.0, old / jnp.where(new == 0, 1.0, new)))


@dataclass(frozen=True)
class LinearFold:
    """Outputs of ``producer`` → linear maps; see ``LinearInput``."""

    linears: tuple[str, ...]
    source: LinearInput
    producer: LinearSpec
    params: Params
    multiply_rows: Rows

    def tie(self, values: jax.Array) -> jax.Array:
        """The mean over the inputs that one output feeds."""
        groups = self._per_output(values)
        return jnp.broadcast_to(groups.mean(axis=1, keepdims=True), groups.shape).reshape(-1)

    def apply(self, factors: jax.Array) -> None:
        """See ``layer_view.Fold``."""
        divisors = self._per_output(factors)[:, 0]
        axis, bias = self.source.axis, self.producer.bias_path
        first_output = {self.producer.path: len(self.producer.inputs)} | ({bias: 0} if bias else {})
        for path, axes_before in first_output.items():
            index = (*(slice(None),) * (axes_before + axis), self.source.index)
            self.params[path] = self.params[path].at[index].divide(divisors)
        for linear in self.linears:
            self.multiply_rows(linear, factors)

    def _per_output(self, values: jax.Array) -> jax.Array:
        """[K] → [X, shared, *Y], where [X, *Y] is the shape of the outputs."""
        outputs = self.producer.outputs
        first, *rest = (*outputs[: self.source.axis], *outputs[self.source.axis + 1 :])
        return values.reshape(first, self.source.shared, *rest)


def folds(
    specs: Sequence[LinearSpec], params: Params, rounded: Rounded, multiply_rows: Rows
) -> Iterator[NormFold | LinearFold]:
    """Yield the scalings of a layer with ``params``, in the order in which its linear maps run.

    Linear maps with the same inputs are scaled together.
    """
    paths = {spec.path: spec for spec in specs}
    for source in dict.fromkeys(spec.source for spec in specs if spec.source is not None):
        fed = tuple(spec.name for spec in specs if spec.source == source)
        if isinstance(source, NormInput):
            yield NormFold(fed, source.scale, params, rounded, multiply_rows)
        else:
            yield LinearFold(fed, source, paths[source.producer], params, multiply_rows)
