"""A program holds whole tokens in its registers: everything is read once and written once. sm_80 and newer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.rms_norm import reference
from pallas_kernels.rms_norm.call import RMSNormCall
from pallas_kernels.rms_norm.reference import rounded
from pallas_kernels.rms_norm.tiles import Tiles, choose
from pallas_kernels.target import Target, current_target

MAX_WIDTH = 32768
"""D beyond which the registers of one program no longer hold a token."""


def check_device(target: Target) -> None:
    """Refuse what is no GPU of sm_80 or newer."""
    need_gpu(target)


def check(call: RMSNormCall) -> None:
    """Refuse D beyond ``MAX_WIDTH``."""
    width = call.x.shape[1]
    if width > MAX_WIDTH:
        raise RefusalError(f"holds a whole token of at most {MAX_WIDTH} elements, have D={width}")


def run(call: RMSNormCall, tiles: Tiles | None = None) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See ``pallas_kernels.rms_norm.rms_norm``."""
    target, added = current_target(), call.residual is not None
    tokens, width = call.x.shape
    chosen = choose(tokens, width, call.x.dtype, added, target, tiles)
    kernel = pl.pallas_call(
        partial(_kernel, eps=call.eps, tile_m=chosen.tile_m, added=added, interpret=target.interpret),
        grid=(pl.cdiv(tokens, chosen.tile_m),),
        out_shape=[jax.ShapeDtypeStruct(call.x.shape, call.x.dtype)] * (1 + added),
        compiler_params=plt.CompilerParams(num_warps=chosen.num_warps, num_stages=1),
        interpret=target.interpret,
        name="rms_norm",
    )

    def norm(call: RMSNormCall) -> Any:
        out = kernel(*jax.tree.leaves(call))
        return tuple(out) if added else out[0]

    out: jax.Array | tuple[jax.Array, jax.Array] = _differentiable(norm)(call)
    return out


def _differentiable(norm: Callable[[RMSNormCall], Any]) -> Callable[[RMSNormCall], Any]:
    """Return ``norm`` with the derivative of the reference. Training needs it; its speed does not matter."""

    def forward(call: RMSNormCall) -> tuple[Any, RMSNormCall]:
        return norm(call), call

    def backward(call: RMSNormCall, cotangents: Any) -> tuple[RMSNormCall]:
        (cotangent,) = jax.vjp(reference.run, call)[1](cotangents)
        return (cotangent,)

    wrapped = jax.custom_vjp(norm)
    wrapped.defvjp(forward, backward)
    return wrapped


def _kernel(x_ref: Any, scale_ref: Any, *refs: Any, eps: float, tile_m: int, added: bool, interpret: bool) -> None:
    """Tokens [tile_m, D]; ``refs`` are (residual, normed, sum) where there is a residual, else (normed)."""
    tokens, width = x_ref.shape
    columns = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)[None, :]
    rows = (pl.program_id(0) * tile_m + jnp.arange(tile_m, dtype=jnp.int32))[:, None]
    mask = (rows < tokens) & (columns < width)

    def read(ref: Any) -> jax.Array:
        return plt.load(ref.at[rows, columns], mask=mask, other=0.0)

    wide, dtype = read(x_ref).astype(jnp.float32), x_ref.dtype
    if added:
        residual_ref, out_ref, total_ref = refs
        total = (wide + read(residual_ref).astype(jnp.float32)).astype(dtype)
        plt.store(total_ref.at[rows, columns], total, mask=mask)
        wide = rounded(total.astype(jnp.float32), dtype) if interpret else total.astype(jnp.float32)
    else:
        (out_ref,) = refs
    mean = jnp.sum(wide * wide, axis=1, keepdims=True) / width
    normed = (wide * jax.lax.rsqrt(mean + eps)).astype(dtype)
    scale = plt.load(scale_ref.at[columns], mask=columns < width, other=0.0)
    plt.store(out_ref.at[rows, columns], normed * scale, mask=mask)
