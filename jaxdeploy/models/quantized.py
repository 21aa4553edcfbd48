"""Weights of linear maps held as integers, in the form that the kernels read.

Each knows its logical axes and the mesh it lies on, and multiplies by itself: ``layers.linear`` asks it to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.leaves import Leaf, axes_of, leaf
from jaxdeploy.models.output_major import OutputMajorWeight, output_major_leaves
from jaxdeploy.parallel.sharding import product_per_device, spec
from pallas_kernels.w4a16_matmul import w4a16_matmul
from pallas_kernels.w4a16_matmul.layout import assemble, group_size, input_size, packed_shape, part_shapes
from pallas_kernels.w8a8_matmul import w8a8_matmul

_DEVIATION = 0.02


class Int4Weight(nnx.Module):
    """4-bit integers with a float16 scale and a zero point for each group of inputs, as AWQ and GPTQ make them.

    ``packed`` is int32 [K / 128, 16 + 128 / g, *outputs], K rounded up; its logical axes are that of the inputs,
    ``None`` and those of the outputs. ``order`` int32 [K] gathers the inputs first, where groups are scattered.
    """

    def __init__(self, packed: Leaf, order: Leaf | None = None, *, inputs: int, mesh: Mesh) -> None:
        self.packed, self.order, self.inputs, self.mesh = packed, order, inputs, mesh

    @property
    def takes_as_is(self) -> bool:
        """Whether inputs go in as they are: none is moved, none is added."""
        return self.order is None and self.inputs == input_size(self.packed.shape)

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs], dtype of ``x``."""
        packed, (inputs, _, *outputs) = self.packed[...], axes_of(self.packed)
        if self.order is not None:
            x = jnp.take(x, self.order[...], axis=1)
        x = jnp.pad(x, ((0, 0), (0, input_size(packed.shape) - self.inputs)))
        ins = (spec(None, inputs), spec(inputs, None, *outputs))
        return product_per_device(self.mesh, _int4_product, inputs, ins, spec(None, *outputs))(x, packed)


class Int8Weight(nnx.Module):
    """8-bit integers with a scale for each output; activations are rounded per token on the way in (SmoothQuant).

    ``values`` int8 [*outputs, K], ``scales`` float32 [*outputs].
    """

    def __init__(self, values: Leaf, scales: Leaf, *, mesh: Mesh) -> None:
        self.values, self.scales, self.mesh = values, scales, mesh

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs], dtype of ``x``."""
        *outputs, inputs = axes_of(self.values)
        ins = (spec(None, inputs), spec(*outputs, inputs), spec(*outputs))
        product = product_per_device(self.mesh, _int8_product, inputs, ins, spec(None, *outputs))
        return product(x, self.values[...], self.scales[...])


HeldInLeaves = Int4Weight | Int8Weight | OutputMajorWeight
"""The weights that are no plain array."""


def int4_leaves(param: Leaf, inputs: int, group: int, *, ordered: bool) -> dict[str, Leaf]:
    """The leaves of an ``Int4Weight``, as shapes, in place of a float ``param`` with so many axes of ``inputs``."""
    shape, axes = param.get_value().shape, axes_of(param)
    width = math.prod(shape[:inputs])
    packed = packed_shape(width, shape[inputs:], group)
    leaves = {"packed": leaf(packed, jnp.int32, (axes[0], None, *axes[inputs:]))}
    return leaves | ({"order": leaf((width,), jnp.int32, (None,))} if ordered else {})


def int8_leaves(param: Leaf, inputs: int) -> dict[str, Leaf]:
    """The leaves of an ``Int8Weight``, as shapes, in place of a float ``param`` with so many axes of ``inputs``."""
    shape, axes = param.get_value().shape, axes_of(param)
    outputs, widths = axes[inputs:], shape[inputs:]
    values = leaf((*widths, math.prod(shape[:inputs])), jnp.int8, (*outputs, axes[0]))
    return {"values": values, "scales": leaf(widths, jnp.float32, outputs)}


def weight_like(param: Leaf, arrays: Mapping[str, jax.Array], mesh: Mesh) -> HeldInLeaves:
    """The weight, its leaves still shapes, that ``arrays`` hold in place of a float ``param``."""
    shape = param.get_value().shape
    if "rows" in arrays:
        return OutputMajorWeight(**output_major_leaves(param, len(shape) - arrays["rows"].ndim + 1), mesh=mesh)
    if "packed" not in arrays:
        return Int8Weight(**int8_leaves(param, len(shape) - arrays["scales"].ndim), mesh=mesh)
    inputs = len(shape) - arrays["packed"].ndim + 2
    group = group_size(arrays["packed"].shape)
    leaves = int4_leaves(param, inputs, group, ordered="order" in arrays)
    return Int4Weight(**leaves, inputs=math.prod(shape[:inputs]), mesh=mesh)


def _random_packed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    words, groups = part_shapes(shape)
    scales = jnp.full(groups, _DEVIATION / 4.6, jnp.float16)
    return assemble(jax.random.bits(key, words, jnp.uint32), scales, jnp.full(groups, 8, jnp.int32))


RANDOM_LEAVES: Mapping[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = {
    "packed": _random_packed,
    "order": lambda key, shape: jax.random.permutation(key, jnp.arange(shape[0], dtype=jnp.int32)),
    "values": lambda key, shape: jax.random.randint(key, shape, -127, 128, jnp.int32).astype(jnp.int8),
    "scales": lambda key, shape: jnp.full(shape, _DEVIATION / 73, jnp.float32),
}
"""Random leaves, by name, of weights that are about as large as random float ones."""


def _int4_product(x: jax.Array, packed: jax.Array) -> jax.Array:
    outputs = packed.shape[2:]
    return w4a16_matmul(x, packed.reshape(*packed.shape[:2], -1)).reshape(-1, *outputs)


def _int8_product(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    product = w8a8_matmul(x, values.reshape(-1, values.shape[-1]), scales.reshape(-1))
    return product.reshape(-1, *scales.shape)
