"""Linear maps, normalisation and embeddings: parameters with logical axes, and the maths on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.leaves import Draw, normal, ones
from jaxdeploy.models.output_major import OutputMajorWeight, product
from pallas_kernels.rms_norm import rms_norm


def parameter(
    rngs: nnx.Rngs, shape: Sequence[int], axes: tuple[str | None, ...], dtype: jnp.dtype
) -> nnx.Param[jax.Array]:
    """A weight drawn from N(0, 0.02²) that names its logical axes (``jaxdeploy.parallel.sharding`` maps them)."""
    value = normal(rngs.params(), tuple(shape), jnp.dtype(jnp.float32)).astype(dtype)
    return nnx.Param(value, axes=axes, draw=normal)


def constant(
    value: float, shape: Sequence[int], axes: tuple[str | None, ...], dtype: jnp.dtype, draw: Draw = normal
) -> nnx.Param[jax.Array]:
    """A parameter that starts as ``value`` everywhere: norm scales and biases."""
    return nnx.Param(jnp.full(tuple(shape), value, dtype), axes=axes, draw=draw)


def value_of(bias: nnx.Param[jax.Array] | None) -> jax.Array | None:
    """The array of a bias that a model may have."""
    return None if bias is None else bias[...]


class MultipliesItself(Protocol):
    """A weight that is no plain array (``quantized``, ``output_major``)."""

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, inputs] → [T, *outputs]."""
        ...


Weight = nnx.Param[jax.Array] | MultipliesItself
"""The weight of a linear map [*inputs, *outputs]."""


def linear(x: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """``x [T, *inputs] · weight [*inputs, *outputs] + bias [*outputs]``.

    The one place that decides how a weight multiplies: the type of the weight chooses the maths.
    """
    if isinstance(weight, nnx.Param):
        y = jnp.tensordot(x, weight[...], axes=x.ndim - 1)
    else:
        y = weight.multiply(x.reshape(x.shape[0], -1))
    return y if bias is None else y + bias


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv:1910.07467) in float32, cast back before the scale is applied.

    A float32 scale, as ``weights.less`` gives it, is applied in float32 before the result is cast back.
    """

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype) -> None:
        self.scale = constant(1.0, (size,), ("embed",), dtype, ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → [T, D], same dtype."""
        scale = self.scale[...]
        wide = x.astype(jnp.float32) if scale.dtype == jnp.float32 else x
        return rms_norm(wide, scale, eps=self.eps).astype(x.dtype)

    def added(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norm of ``x + residual`` and that sum, [T, D] each."""
        scale = self.scale[...]
        if scale.dtype == x.dtype:
            return rms_norm(x, scale, residual, eps=self.eps)
        total = x + residual
        return self(total), total


class Embedding(nnx.Module):
    """Token embeddings [V, D]; replicated under tensor parallelism, so that looking a token up needs no traffic."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.table = parameter(rngs, (vocab, size), ("table", "embed"), dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``tokens`` int32 [...] → [..., D]."""
        return jnp.take(self.table[...], tokens, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V], through the transposed table (a tied head)."""
        return product(x, self.table[...], jnp.float32)


class Head(nnx.Module):
    """Output projection [D, V] of a model whose embeddings are not tied."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.weight: nnx.Param[jax.Array] | OutputMajorWeight = parameter(
            rngs, (size, vocab), ("embed", "vocab"), dtype
        )

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V]."""
        if isinstance(self.weight, OutputMajorWeight):
            return product(x, self.weight.rows[...], jnp.float32)
        return jnp.matmul(x, self.weight[...], preferred_element_type=jnp.float32)
