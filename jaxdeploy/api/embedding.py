"""What stands for a text: the hidden states of its tokens, made one vector."""

from __future__ import annotations

import math

from jaxdeploy.errors import RequestError
from jaxdeploy.messages import PromptResult

POOLINGS = ("last", "mean")
"""The state of the last token, which has seen all others, or the mean of all."""


def pooled(
    result: PromptResult, pooling: str = "last", *, normalize: bool = True, dimensions: int | None = None
) -> list[float]:
    """One vector of D numbers, or of the first ``dimensions`` of them; of length 1 where it is to ``normalize``.

    Raises ``RequestError`` for another pooling than ``POOLINGS``, or for more dimensions than there are.
    """
    if pooling not in POOLINGS:
        raise RequestError(f"pooling={pooling!r:.40} is not one of {', '.join(POOLINGS)}; take one of these")
    vector = result.last if pooling == "last" else result.mean
    if dimensions is not None and not 1 <= dimensions <= len(vector):
        raise RequestError(f"dimensions={dimensions} must be between 1 and the model's {len(vector)}; ask for fewer")
    kept = list(vector[:dimensions])
    length = math.sqrt(sum(value * value for value in kept)) if normalize else 1.0
    return [value / length for value in kept] if length else kept
