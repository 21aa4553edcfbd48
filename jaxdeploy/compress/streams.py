"""Hidden states of sequences between two layers: kept on the host, a batch at a time on the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdeploy.compress.forward import LayerForward, LayerParams, Sums
from jaxdeploy.compress.layer_view import Inputs
from jaxdeploy.parallel.mesh import TP_AXIS
from jaxdeploy.parallel.sharding import replicated

Array = np.ndarray[Any, Any]

SAMPLE = 512
"""Tokens whose inputs are kept as they are, for searches that look at outputs."""


class HiddenStates:
    """Hidden states [S, T, D] of S sequences.

    Batches are as large as ``batch_size`` and the devices of ``mesh``, which share a batch, suggest; they divide S.
    """

    def __init__(self, values: Array, batch_size: int, mesh: Mesh) -> None:
        self.values, self._mesh = values, mesh
        most = max(batch_size, mesh.size)
        self._batch = next((n for n in range(min(most, len(values)), 0, -1) if len(values) % n == 0), 1)

    @property
    def tokens(self) -> int:
        """S · T."""
        return math.prod(self.values.shape[:2])

    def batches(self) -> Iterator[tuple[slice, jax.Array]]:
        """Where each batch lies, and the batch [B, T, D] on the devices."""
        spread = PartitionSpec(TP_AXIS) if self._batch % self._mesh.size == 0 else PartitionSpec()
        for start in range(0, len(self.values), self._batch):
            place = slice(start, start + self._batch)
            yield place, jax.device_put(self.values[place], NamedSharding(self._mesh, spread))

    def advance(self, layer: Callable[[jax.Array], jax.Array]) -> None:
        """Replace the states by what ``layer`` makes of each batch."""
        for place, batch in self.batches():
            self.values[place] = np.asarray(layer(batch))

    def listen(
        self, forward: LayerForward, params: LayerParams, names: Sequence[str], *, gram: bool
    ) -> dict[str, Inputs]:
        """Statistics of what the linear maps ``names`` of a layer with ``params`` are fed."""
        heard: dict[str, Sums] = {}
        whole = jax.device_put(dict(params), replicated(self._mesh))
        for place, batch in self.batches():
            sums = forward.listen(whole, batch, self._picks(place.start), tuple(names), gram=gram)
            heard = {name: _added(heard[name], new) if heard else new for name, new in sums.items()}
        return {name: self._inputs(sums) for name, sums in heard.items()}

    def _picks(self, start: int) -> jax.Array:
        """Which tokens of the batch at ``start`` go into the sample: evenly spread, elsewhere in every batch."""
        size = self._batch * self.values.shape[1]
        count = min(size, -(-SAMPLE * self._batch // len(self.values)))
        return jnp.asarray((np.arange(count) * size // count + start * 7919) % size, jnp.int32)

    def _inputs(self, sums: Sums) -> Inputs:
        tokens = jnp.float32(self.tokens)
        gram = None if sums.gram is None else sums.gram / tokens
        return Inputs(self.tokens, sums.total / tokens, sums.peak, sums.sample, gram)


@jax.jit
def _added(old: Sums, new: Sums) -> Sums:
    gram = None if old.gram is None or new.gram is None else old.gram + new.gram
    sample = jnp.concatenate([old.sample, new.sample])
    return Sums(old.total + new.total, jnp.maximum(old.peak, new.peak), sample, gram)


def no_data(proxies: Mapping[str, jax.Array], *, gram: bool, seed: int) -> dict[str, Inputs]:
    """Stand-ins for the statistics of inputs about which only a typical size, ``proxies`` [K], is known."""
    made = {}
    for index, (name, size) in enumerate(proxies.items()):
        draw = jax.random.normal(jax.random.key(seed + index), (SAMPLE, size.shape[0]), jnp.float32)
        made[name] = Inputs(0, size, size, draw * size, jnp.diag(size**2) if gram else None)
    return made
