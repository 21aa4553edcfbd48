"""Weights of linear maps held as integers, in the form that the kernels read.

Each knows its logical axes and the mesh it lies on, and multiplies by itself: ``layers.linear`` asks it to.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.leaves import DEVIATION, Leaf, axes_of, leaf
from jaxdeploy.parallel.sharding import product_per_device, spec
from pallas_kernels.w4a16_matmul import w4a16_matmul
from pallas_kernels.w4a16_matmul.layout import assemble, input_size, packed_shape, part_shapes
from pallas_kernels.w8a8_matmul import w8a8_matmul


class Int4Weight(nnx.Module):
    """4-bit integers with a float16 scale and a zero point for each group of inputs, as AWQ and GPTQ make them.

    ``packed`` is int32 [K / 128, 16 + 128 / g, *outputs], K rounded up; its logical axes are that of the inputs,
    ``None`` and those of the outputs. ``order`` int32 [K] gathers the inputs first, where groups are scattered.
    """

    def __init__(self, packed: Leaf, order: Leaf | None = None, *, inputs: int, mesh: Mesh) -> None:
        self.packed, self.order, self.inputs, self.mesh = packed, order, inputs, mesh

    @classmethod
    def abstract(cls, param: Leaf, inputs: int, group: int, *, ordered: bool, mesh: Mesh) -> Int4Weight:
        """Return a weight of shapes in place of the float ``param``, whose first ``inputs`` axes are its inputs.

        ``ordered``: the groups are scattered over the inputs.
        """
        shape, axes = param.get_value().shape, axes_of(param)
        width = math.prod(shape[:inputs])
        packed = packed_shape(width, shape[inputs:], group)
        order = leaf((width,), jnp.int32, (None,), _random_order) if ordered else None
        words = leaf(packed, jnp.int32, (axes[0], None, *axes[inputs:]), _random_packed)
        return cls(words, order, inputs=width, mesh=mesh)

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

    @classmethod
    def abstract(cls, param: Leaf, inputs: int, *, mesh: Mesh) -> Int8Weight:
        """Return a weight of shapes in place of the float ``param``, whose first ``inputs`` axes are its inputs."""
        shape, axes = param.get_value().shape, axes_of(param)
        values = leaf((*shape[inputs:], math.prod(shape[:inputs])), jnp.int8, (*axes[inputs:], axes[0]), _random_int8)
        return cls(values, leaf(shape[inputs:], jnp.float32, axes[inputs:], _random_scales), mesh=mesh)

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs], dtype of ``x``."""
        *outputs, inputs = axes_of(self.values)
        ins = (spec(None, inputs), spec(*outputs, inputs), spec(*outputs))
        product = product_per_device(self.mesh, _int8_product, inputs, ins, spec(None, *outputs))
        return product(x, self.values[...], self.scales[...])


def _int4_product(x: jax.Array, packed: jax.Array) -> jax.Array:
    outputs = packed.shape[2:]
    return w4a16_matmul(x, packed.reshape(*packed.shape[:2], -1)).reshape(-1, *outputs)


def _int8_product(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    product = w8a8_matmul(x, values.reshape(-1, values.shape[-1]), scales.reshape(-1))
    return product.reshape(-1, *scales.shape)


def _random_packed(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    words, groups = part_shapes(shape)
    scales = jnp.full(groups, DEVIATION / 4.6, jnp.float16)
    return assemble(jax.random.bits(key, words, jnp.uint32), scales, jnp.full(groups, 8, jnp.int32))


def _random_order(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.permutation(key, jnp.arange(shape[0], dtype=jnp.int32))


def _random_int8(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.randint(key, shape, -127, 128, jnp.int32).astype(jnp.int8)


def _random_scales(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.full(shape, DEVIATION / 73, jnp.float32)
