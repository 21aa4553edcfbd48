"""Float weights of linear maps stored with their outputs first: the way round that a CPU multiplies fastest."""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jaxdeploy.models.leaves import Leaf, axes_of, leaf, normal
from jaxdeploy.parallel.sharding import product_per_device, spec
from pallas_kernels.target import current_target

_FEW = 32
"""Tokens up to which a CPU is faster with the weight on the left (``docs/adr/0004-output-major-weights.md``)."""


class OutputMajorWeight(nnx.Module):
    """``rows`` float [*outputs, K]: one row for each output, as checkpoints store it."""

    def __init__(self, rows: Leaf, *, mesh: Mesh) -> None:
        self.rows, self.mesh = rows, mesh

    @classmethod
    def abstract(cls, param: Leaf, inputs: int, *, mesh: Mesh) -> OutputMajorWeight:
        """Return a weight of shapes in place of the ``param``, whose first ``inputs`` axes are its inputs."""
        own, axes = param.get_value(), axes_of(param)
        shape = (*own.shape[inputs:], math.prod(own.shape[:inputs]))
        return cls(leaf(shape, own.dtype, (*axes[inputs:], axes[0]), normal), mesh=mesh)

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs], dtype of ``x``."""
        *outputs, inputs = axes_of(self.rows)
        ins = (spec(None, inputs), spec(*outputs, inputs))
        return product_per_device(self.mesh, product, inputs, ins, spec(None, *outputs))(x, self.rows[...])


def product(x: jax.Array, rows: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """``x`` [T, K] · ``rows`` [*outputs, K] → [T, *outputs] in ``dtype`` (default: that of ``x``)."""
    outputs, matrix = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
    both_last = (((1,), (1,)), ((), ()))
    if not 1 < x.shape[0] <= _FEW or current_target().platform != "cpu":
        return lax.dot_general(x, matrix, both_last, preferred_element_type=dtype).reshape(-1, *outputs)
    columns = lax.dot_general(matrix, x, both_last, preferred_element_type=dtype)
    # Without the barrier XLA would take in the transpose, and put the few tokens on the left again.
    y: jax.Array = lax.optimization_barrier(columns).T
    return y.reshape(-1, *outputs)
