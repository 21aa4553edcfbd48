"""The end of a branch: its partial products are added to the residual stream, and that is normalised for what follows.

Kernels 4 and 7 of the set. One program for each row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.decode_layer.linear import whole
from pallas_kernels.target import current_target


def reduce_norm(
    partials: jax.Array, bias: jax.Array | None, x: jax.Array, norm: jax.Array, *, eps: float, num_warps: int, name: str
) -> tuple[jax.Array, jax.Array]:
    """``x + bias + Σ partials``, and the RMSNorm (arXiv:1910.07467) of that.

    Args:
        partials: float [splits, B, D].
        bias: [D] or ``None``.
        x: [rows, D], updated in place; rows from B on, which stand for nothing, become zero in both results.
        norm: [D].
        eps: added to the mean square.
        num_warps: of each program.
        name: of the kernel.
    """
    splits, tokens, width = partials.shape
    padded = int(pl.next_power_of_2(width))
    biases = [] if bias is None else [bias]

    def kernel(partials_ref: Any, x_ref: Any, norm_ref: Any, *refs: Any) -> None:
        *bias_refs, out, normed = refs
        row, columns = pl.program_id(0), jnp.arange(padded, dtype=jnp.int32)
        inside = columns < width
        real = inside & (row < tokens)

        def load(ref: Any, mask: jax.Array) -> jax.Array:
            return plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

        total = load(x_ref.at[row, columns], real)
        for split in range(splits):
            total += load(partials_ref.at[jnp.int32(split), row, columns], real)
        for ref in bias_refs:
            total += load(ref.at[columns], real)
        rounded = total.astype(x.dtype)
        wide = rounded.astype(jnp.float32)
        scaled = wide * lax.rsqrt(jnp.sum(wide * wide) / width + eps)
        scale = plt.load(norm_ref.at[columns], mask=inside, other=jnp.zeros((), norm.dtype))
        plt.store(out.at[row, columns], rounded, mask=inside)
        plt.store(normed.at[row, columns], scaled.astype(x.dtype) * scale, mask=inside)

    operands = [partials, x, norm, *biases]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    out, normed = pl.pallas_call(
        kernel,
        grid=(x.shape[0],),
        in_specs=[whole(array) for array in operands],
        out_specs=[whole(shape), whole(shape)],
        out_shape=[shape, shape],
        input_output_aliases={1: 0},
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=current_target().interpret,
        name=name,
    )(*operands)
    return out, normed
