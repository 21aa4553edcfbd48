"""One layer under quantisation: the ``LayerView`` that methods work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxdeploy.compress.folds import Rounded as AsStored
from jaxdeploy.compress.folds import folds
from jaxdeploy.compress.forward import LayerParams, round_tokens
from jaxdeploy.compress.grid import ChannelRounded, Grid, Rounded
from jaxdeploy.compress.layer_view import Fold, Inputs
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.linears import LinearSpec

Listen = Callable[[LayerParams, Sequence[str]], dict[str, Inputs]]
"""Statistics of what linear maps of a layer with such parameters are fed."""


class LayerInWork:
    """See ``layer_view.LayerView``.

    ``specs``: its linear maps.
    ``params``: its parameters as they are now.
    ``errors``: those of the linear maps that are stored.
    ``grids``: which linear maps are quantised, and how.
    ``rounded``: how a float parameter is rounded when it is stored.
    ``one_by_one``: compute the inputs of a linear map on request, after what was stored before it; otherwise compute
    the inputs of all maps at the first request.
    """

    def __init__(
        self,
        specs: Sequence[LinearSpec],
        params: LayerParams,
        listen: Listen,
        grids: Mapping[str, Grid],
        *,
        rounded: AsStored,
        one_by_one: bool,
    ) -> None:
        self.params = dict(params)
        self.rounded: dict[str, Rounded | ChannelRounded] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.notes: dict[str, str] = {}
        self._grids, self._listen, self._one_by_one = grids, listen, one_by_one
        self._inputs: dict[str, Inputs] = {}
        self._specs = {spec.name: spec for spec in specs}
        known = folds(specs, self.params, rounded, self._multiply_rows)
        self._folds = tuple(fold for fold in known if any(name in grids for name in fold.linears))

    @property
    def linears(self) -> tuple[str, ...]:
        """Those to quantise."""
        return tuple(name for name in self._specs if name in self._grids)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Those of linear maps to quantise."""
        return self._folds

    def grid(self, name: str) -> Grid:
        """See ``LayerView``."""
        return self._grids[name]

    def weight(self, name: str) -> jax.Array:
        """See ``LayerView``."""
        spec = self._specs[name]
        return self.params[spec.path].reshape(spec.width, -1)

    def inputs(self, name: str) -> Inputs:
        """See ``LayerView``."""
        if name not in self._inputs:
            wanted = (name,) if self._one_by_one else tuple(n for n in self.linears if n not in self._inputs)
            self._inputs |= self._listen(self.params, wanted)
        return self._inputs[name]

    def store(self, name: str, rounded: Rounded | ChannelRounded, note: str = "") -> None:
        """See ``LayerView``. Raises ``CheckpointError`` where the result is not finite."""
        before, after = self.weight(name), rounded.value()
        sample = self.inputs(name).sample
        fed = round_tokens(sample) if isinstance(rounded, ChannelRounded) else sample
        output, weight = (float(error) for error in _errors(sample, before, fed, after))
        if not (math.isfinite(output) and math.isfinite(weight)):
            raise CheckpointError(f"{name}: the quantised weight or its output is not finite")
        self.errors[name], self.rounded[name] = (output, weight), rounded
        self.notes[name] = note
        path = self._specs[name].path
        self.params[path] = after.reshape(self.params[path].shape)
        if self._one_by_one:
            self._inputs.clear()

    def _multiply_rows(self, name: str, factors: jax.Array) -> None:
        """Multiply the rows of a linear map. Its inputs are divided by the same factors."""
        path = self._specs[name].path
        self.params[path] = (self.weight(name) * factors[:, None]).reshape(self.params[path].shape)
        if known := self._inputs.get(name):
            self._inputs[name] = Inputs(
                known.tokens,
                known.mean_abs / factors,
                known.peak / factors,
                known.sample / factors,
                None if known.gram is None else known.gram / (factors[:, None] * factors),
                None if known.unseen is None else known.unseen / factors,
            )


@jax.jit
def _errors(x: jax.Array, before: jax.Array, fed: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
    """‖XW − X̂Ŵ‖² / ‖XW‖² and ‖W − Ŵ‖² / ‖W‖²."""
    right = x @ before
    output = jnp.square(right - fed @ after).sum() / jnp.maximum(jnp.square(right).sum(), 1e-30)
    weight = jnp.square(before - after).sum() / jnp.maximum(jnp.square(before).sum(), 1e-30)
    return output, weight
