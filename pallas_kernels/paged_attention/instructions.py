"""Instructions of NVIDIA GPUs that JAX has no name for, each beside what it computes.

The compiler that Pallas uses neither joins a product and a sum into one instruction, nor takes the fast exponential as
it stands. Where kernels are interpreted there is no assembly, and the plain form runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.target import current_target


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """``a · b + c`` in float32, rounded once; the three broadcast."""
    if current_target().interpret:
        return a * b + c
    a, b, c = jnp.broadcast_arrays(a, b, c)
    return assembly("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, a, b, c)


def exp2(x: jax.Array) -> jax.Array:
    """2 to the power of float32 ``x`` (relative error 2^-22), results below 2^-126 as 0."""
    return jnp.exp2(x) if current_target().interpret else assembly("ex2.approx.ftz.f32 $0, $1;", "=f,f", jnp.float32, x)


def log2(x: jax.Array) -> jax.Array:
    """Logarithm of float32 ``x`` to base 2 (absolute error 2^-22), that of 0 as -inf."""
    return jnp.log2(x) if current_target().interpret else assembly("lg2.approx.ftz.f32 $0, $1;", "=f,f", jnp.float32, x)


def reciprocal(x: jax.Array) -> jax.Array:
    """``1 / x`` in float32 (relative error 2^-23)."""
    return 1 / x if current_target().interpret else assembly("rcp.approx.ftz.f32 $0, $1;", "=f,f", jnp.float32, x)


def tanh(x: jax.Array) -> jax.Array:
    """Hyperbolic tangent of float32 ``x``, to float32's precision where the GPU's own has 11 bits."""
    e = exp2(x * (2 * LOG2_E))
    return 1 - 2 * reciprocal(e + 1)


LOG2_E = 1.4426950408889634


def assembly(code: str, constraints: str, dtype: DTypeLike, *args: jax.Array, pack: int = 1) -> jax.Array:
    """One elementwise result of ``code``, which handles ``pack`` elements at a time."""
    result = [jax.ShapeDtypeStruct(args[0].shape, jnp.dtype(dtype))]
    (out,) = plt.elementwise_inline_asm(code, args=args, constraints=constraints, pack=pack, result_shape_dtypes=result)
    return lax.convert_element_type(out, dtype)
