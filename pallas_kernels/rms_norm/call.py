"""One call of the op as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RMSNormCall:
    """Tokens to normalise.

    Attributes:
        x: [T, D] float.
        scale: [D], dtype of ``x``.
        residual: [T, D], dtype of ``x``, or ``None``. The sum is rounded to that dtype before it is normalised.
        eps: added to the mean of the squares.
    """

    OP: ClassVar = "rms_norm"

    x: jax.Array
    scale: jax.Array
    residual: jax.Array | None = None
    eps: float = field(default=1e-5, metadata={"static": True})

    def validate(self) -> None:
        """Raise ``ValueError`` for shapes or dtypes that do not fit together."""
        x, scale, residual = self.x, self.scale, self.residual
        if x.ndim != 2 or scale.shape != x.shape[1:] or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x {x.dtype}{x.shape} does not fit scale {scale.shape}; expected floats [T, D] and [D]")
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"residual {residual.shape} does not fit x {x.shape}; expected the same [T, D]")
        for name, array in (("scale", scale), ("residual", residual)):
            if array is not None and array.dtype != x.dtype:
                raise ValueError(f"{name} dtype={array.dtype} must be that of x, {x.dtype}; cast it")
