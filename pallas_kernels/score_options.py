"""What happens to attention scores between the product of queries and keys, and the softmax."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import RefusalError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreOptions:
    """Options of causal attention. Each but ``scale`` is off by default and then costs nothing.

    They apply in this order: scale, softcap, slopes, window, sinks.

    Attributes:
        scale: factor of the scores; positive.
        window: a query attends to itself and the ``window - 1`` tokens before it; ``None`` for all.
        softcap: a score s becomes ``softcap · tanh(s / softcap)`` (arXiv:2408.00118); ``None`` for no cap.
        slopes: float32 [N], ALiBi slopes (arXiv:2108.12409). Head n adds
            ``slopes[n] · (key position - query position)``.
        sinks: float32 [N], one more logit per head in the softmax. It belongs to no token and adds no value.
    """

    scale: float = field(metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    softcap: float | None = field(default=None, metadata={"static": True})
    slopes: jax.Array | None = None
    sinks: jax.Array | None = None

    def validate(self, heads: int) -> None:
        """Raise ``ValueError`` for a value out of range, or an array that is not float32 [``heads``]."""
        for name, value in (("scale", self.scale), ("window", self.window), ("softcap", self.softcap)):
            if value is not None and value <= 0:
                hint = "" if name == "scale" else "; leave it out for none"
                raise ValueError(f"{name}={value} must be positive{hint}")
        for name, array in (("slopes", self.slopes), ("sinks", self.sinks)):
            if array is not None and (array.shape != (heads,) or array.dtype != jnp.float32):
                raise ValueError(
                    f"{name} {array.dtype}{array.shape} must be float32 [{heads}], one for each query head"
                )

    def refuse(self, *names: str) -> None:
        """Raise ``RefusalError`` if an option in ``names`` is set: for backends that do not implement it."""
        used = [name for name in names if getattr(self, name) is not None]
        if used:
            raise RefusalError(f"does not support {' and '.join(used)}")
