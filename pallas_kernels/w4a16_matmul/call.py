"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.w4a16_matmul.layout import GROUP_SIZES, input_size, packed_shape

_CHUNK_ROWS = {packed_shape(1, (), group)[1] for group in GROUP_SIZES}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class W4A16MatmulCall:
    """Activations and a packed weight.

    Attributes:
        x: [M, K] bfloat16 or float16; float32 for ``xla`` and ``reference``.
        packed: int32 [K / 128, 16 + 128 / g, N], the weight [K, N] as described in ``layout``.
        bias: [N], dtype of ``x``, or ``None``.
    """

    OP: ClassVar = "w4a16_matmul"

    x: jax.Array
    packed: jax.Array
    bias: jax.Array | None = None

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes or dtypes that do not fit together."""
        x, packed, bias = self.x, self.packed, self.bias
        if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise ValueError(f"x {x.dtype}{x.shape} must be [M, K] in bfloat16, float16 or float32; reshape or cast it")
        if packed.ndim != 3 or packed.dtype != jnp.int32 or packed.shape[1] not in _CHUNK_ROWS:
            raise ValueError(
                f"packed {packed.dtype}{packed.shape} must be int32 [K / 128, 16 + 128 / g, N] with g of 32, 64 or "
                "128; make it with pallas_kernels.w4a16_matmul.packing"
            )
        if x.shape[1] != input_size(packed.shape):
            raise ValueError(f"x {x.shape} does not fit packed {packed.shape}; K must be 128 times its first dimension")
        if bias is not None and (bias.shape != packed.shape[2:] or bias.dtype != x.dtype):
            raise ValueError(f"bias {bias.dtype}{bias.shape} must be {x.dtype}{packed.shape[2:]}: [N], dtype of x")
