"""The rows of an array as arrays of their own: small weights that reach a step as one argument, used one by one.

A launch costs the host time for each of its arguments; XLA would copy every row in a launch of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.target import current_target

_TILE = 1024
"""Elements of one program: 8 for each of its 128 threads, a load of 16 bytes of 2-byte floats."""


def unstack(rows: jax.Array) -> tuple[jax.Array, ...]:
    """``rows`` [R, D], any dtype → R arrays [D]; on a GPU in one launch."""
    return unstack_in_one_launch(rows) if current_target().is_gpu else tuple(rows)


def unstack_in_one_launch(rows: jax.Array) -> tuple[jax.Array, ...]:
    """``unstack`` by its kernel, which is interpreted off a GPU."""
    count, width = rows.shape

    def kernel(rows_ref: Any, *outs: Any) -> None:
        row, columns = pl.program_id(0), pl.program_id(1) * _TILE + jnp.arange(_TILE, dtype=jnp.int32)
        inside = columns < width
        value = plt.load(rows_ref.at[row, columns], mask=inside, other=jnp.zeros((), rows.dtype))
        for index, out in enumerate(outs):
            plt.store(out.at[columns], value, mask=inside & (row == index))

    out: tuple[jax.Array, ...] = pl.pallas_call(
        kernel,
        grid=(count, pl.cdiv(width, _TILE)),
        out_shape=(jax.ShapeDtypeStruct((width,), rows.dtype),) * count,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=current_target().interpret,
        name="unstack",
    )(rows)
    return out
