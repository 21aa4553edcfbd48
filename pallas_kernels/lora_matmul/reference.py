"""The op in plain jnp, for any platform, float dtype and rank.

It goes through the adapters that occur in the batch: one after another all tokens are multiplied with an entry, and its
own keep the result. So an entry that no token uses costs nothing, and one that overflows harms only its own tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.lora_matmul.call import LoRAMatmulCall
from pallas_kernels.lora_matmul.tiles import Tiles
from pallas_kernels.target import Target

Array = np.ndarray[Any, Any]
State = tuple[jax.Array, jax.Array]
"""What tokens still wait for: int32 [T], -1 where they have it; and the result so far, float32 [T, N]."""


def check_device(target: Target) -> None:
    """Runs everywhere."""


def check(call: LoRAMatmulCall) -> None:
    """Accepts every call."""


def run(call: LoRAMatmulCall, tiles: Tiles | None = None) -> jax.Array:
    """See ``pallas_kernels.lora_matmul.lora_matmul``; uses neither ``candidates`` nor ``ranks``, ignores ``tiles``."""
    x, a, b, widths = call.x, call.a, call.b, call.widths
    wide, modules = x.astype(jnp.float32), np.resize(np.repeat(np.arange(len(widths)), widths), b.shape[2])

    def waiting(state: State) -> jax.Array:
        return (state[0] >= 0).any()

    def serve(state: State) -> State:
        awaited, out = state
        entry = awaited.max()
        own = awaited == entry
        product = _product(wide, a[entry], b[entry], modules)
        return jnp.where(own, -1, awaited), jnp.where(own[:, None], product, out)

    out = jnp.zeros((x.shape[0], b.shape[2]), jnp.float32)
    return lax.while_loop(waiting, serve, (call.adapter, out))[1].astype(x.dtype)


def _product(x: jax.Array, a: jax.Array, b: jax.Array, modules: Array) -> jax.Array:
    """float32 ``x`` [T, K] · ``a`` [K, M·R] · ``b`` [R, N] → float32 [T, N]; ``modules`` [N] has each column's."""
    down = jnp.dot(x, a.astype(jnp.float32), precision=lax.Precision.HIGHEST).reshape(x.shape[0], -1, b.shape[0])
    every = jnp.einsum("tmr,rn->tmn", down, b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return jnp.take_along_axis(every, modules[None, None], axis=1)[:, 0]
