"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

MAX_K = (2**31 - 1) // 127**2
"""K beyond which an int32 sum of products could overflow."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class W8A8MatmulCall:
    """Activations and an int8 weight.

    Attributes:
        x: [M, K] float.
        weight: int8 [N, K], symmetric.
        scales: float32 [N], the step of each output column's weights.
        bias: [N] float, added in float32, or ``None``.
    """

    OP: ClassVar = "w8a8_matmul"

    x: jax.Array
    weight: jax.Array
    scales: jax.Array
    bias: jax.Array | None = None

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes or dtypes that do not fit together."""
        x, weight, scales = self.x, self.weight, self.scales
        if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"x {x.shape} does not fit weight {weight.shape}; expected [M, K] and [N, K]")
        if not jnp.issubdtype(x.dtype, jnp.floating) or weight.dtype != jnp.int8 or scales.dtype != jnp.float32:
            raise ValueError(
                f"x {x.dtype}, weight {weight.dtype}, scales {scales.dtype} must be a float, int8 and float32; "
                "cast them"
            )
        for name, array in (("scales", scales), ("bias", self.bias)):
            if array is not None and array.shape != weight.shape[:1]:
                raise ValueError(f"{name} {array.shape} does not fit weight {weight.shape}; expected [N] and [N, K]")
        if x.shape[1] > MAX_K:
            raise ValueError(f"K={x.shape[1]} could overflow the int32 sums; at most {MAX_K}")
