"""A model's weights as the arguments of a step: few arrays, for each one costs the host time in every launch.

Vectors of one size, which are mostly the scales of norms, travel as the rows of one array.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.model import Model
from jaxdeploy.parallel.sharding import per_device, spec
from pallas_kernels.unstack import unstack

Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class StepWeights:
    """How to make the model again, inside the step, out of the arrays of ``flatten``.

    ``stacks`` says for each of the first arrays which leaves are its rows; the other arrays are the other leaves.
    """

    mesh: Mesh
    graph: nnx.GraphDef[Any]
    tree: jax.tree_util.PyTreeDef
    stacks: tuple[tuple[int, ...], ...]

    def model(self, arrays: Arrays) -> Model:
        """Return the model that holds the first of ``arrays``."""
        apart = per_device(self.mesh, unstack, spec(), spec())
        stacked, rest = arrays[: len(self.stacks)], iter(arrays[len(self.stacks) :])
        rows: dict[int, jax.Array] = {}
        for leaves, stack in zip(self.stacks, stacked, strict=True):
            rows |= zip(leaves, apart(stack), strict=True)
        every = [rows[leaf] if leaf in rows else next(rest) for leaf in range(self.tree.num_leaves)]
        model: Model = nnx.merge(self.graph, jax.tree.unflatten(self.tree, every))
        return model


def flatten(model: Model, mesh: Mesh) -> tuple[StepWeights, Arrays]:
    """Return the arrays that a step takes, or their shapes if the model holds shapes."""
    graph, weights = nnx.split(model)
    leaves, tree = jax.tree.flatten(weights)
    alike = defaultdict[Any, list[int]](list)
    for index, leaf in enumerate(leaves):
        if leaf.ndim == 1 and (leaf.sharding is None or leaf.sharding.is_fully_replicated):
            alike[leaf.shape, leaf.dtype].append(index)
    stacks = tuple(tuple(indices) for indices in alike.values() if len(indices) > 1)
    stacked = {index for stack in stacks for index in stack}
    rows = [_stack([leaves[index] for index in stack]) for stack in stacks]
    rest = [leaf for index, leaf in enumerate(leaves) if index not in stacked]
    return StepWeights(mesh, graph, tree, stacks), (*rows, *rest)


def _stack(rows: list[Any]) -> Any:
    if isinstance(rows[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(rows), *rows[0].shape), rows[0].dtype, sharding=rows[0].sharding)
    return jnp.stack(rows)
