"""Hidden states of sequences between two layers: kept on the host, a batch at a time on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdeploy.compress.forward import LayerForward, LayerParams, Sums
from jaxdeploy.compress.layer_view import Inputs
from jaxdeploy.parallel.mesh import TP_AXIS, axis_size
from jaxdeploy.parallel.sharding import replicated

Array = np.ndarray[Any, Any]

SAMPLE = 512
"""Tokens whose inputs are kept as they are, for searches that look at outputs."""


HELD_BACK = 8
"""One sequence in so many is not counted in any statistic."""
MIN_SEQUENCES = 4


class HiddenStates:
    """Hidden states [S, T, D] of S sequences.

    Batches are as large as ``batch_size`` and the devices of ``mesh``, which share a batch, suggest; they divide the
    number of sequences.
    """

    def __init__(self, values: Array, batch_size: int, mesh: Mesh) -> None:
        self.values, self._mesh = values, mesh
        self._most = max(batch_size, axis_size(mesh, TP_AXIS))

    def batches(self, rows: Array | None = None) -> Iterator[tuple[Array, jax.Array]]:
        """The numbers of the sequences of each batch, and the batch [B, T, D] on the devices.

        ``rows`` are the numbers of the sequences to take (default: all).
        """
        rows = np.arange(len(self.values)) if rows is None else rows
        size = next((n for n in range(min(self._most, len(rows)), 0, -1) if len(rows) % n == 0), 1)
        spread = PartitionSpec(TP_AXIS) if size % axis_size(self._mesh, TP_AXIS) == 0 else PartitionSpec()
        for place in rows.reshape(-1, size):
            yield place, jax.device_put(self.values[place], NamedSharding(self._mesh, spread))

    def advance(self, layer: Callable[[jax.Array], jax.Array]) -> None:
        """Replace the states by what ``layer`` makes of each batch."""
        for place, batch in self.batches():
            self.values[place] = np.asarray(layer(batch))

    def listen(
        self, forward: LayerForward, params: LayerParams, names: Sequence[str], *, gram: bool
    ) -> dict[str, Inputs]:
        """Statistics of what the linear maps ``names`` of a layer with ``params`` are fed."""
        whole = jax.device_put(dict(params), replicated(self._mesh))
        held_back = np.zeros(len(self.values), np.bool_)
        if len(self.values) >= MIN_SEQUENCES:
            held_back[min(HELD_BACK, len(self.values)) - 1 :: HELD_BACK] = True
        listen = partial(forward.listen, whole, names=tuple(names), gram=gram)
        heard = self._heard(listen, np.flatnonzero(~held_back))
        unseen = self._heard(listen, np.flatnonzero(held_back)) if held_back.any() else {}
        tokens = int((~held_back).sum()) * self.values.shape[1]
        return {name: _inputs(sums, tokens, unseen.get(name)) for name, sums in heard.items()}

    def _heard(self, listen: Callable[..., dict[str, Sums]], rows: Array) -> dict[str, Sums]:
        """Sums over the sequences ``rows``."""
        heard: dict[str, Sums] = {}
        for place, batch in self.batches(rows):
            sums = listen(batch, self._picks(int(place[0]), len(place), len(rows)))
            heard = {name: _added(heard[name], new) if heard else new for name, new in sums.items()}
        return heard

    def _picks(self, start: int, batch: int, sequences: int) -> jax.Array:
        """Which tokens of a batch from ``start`` on go into the sample: evenly spread, elsewhere in every batch."""
        size = batch * self.values.shape[1]
        count = min(size, -(-SAMPLE * batch // sequences))
        return jnp.asarray((np.arange(count) * size // count + start * 7919) % size, jnp.int32)


def _inputs(sums: Sums, tokens: int, unseen: Sums | None) -> Inputs:
    count = jnp.float32(tokens)
    gram = None if sums.gram is None else sums.gram / count
    other = None if unseen is None else unseen.sample
    return Inputs(tokens, sums.total / count, sums.peak, sums.sample, gram, other)


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
