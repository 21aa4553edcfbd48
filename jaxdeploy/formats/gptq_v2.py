"""GPTQ with zero points stored as they are: ``gptq`` with another word in its description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxdeploy.formats import gptq
from jaxdeploy.formats.gptq import GROUPS, check, decode, encode, group_count, tensors

__all__ = ["GROUPS", "check", "decode", "describe", "encode", "group_count", "tensors"]


def describe(*, bits: int, group_size: int, symmetric: bool, act_order: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of what ``encode`` makes; ``skipped`` are module names, or their last components."""
    described = gptq.describe(
        bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order, skipped=skipped
    )
    return described | {"checkpoint_format": "gptq_v2"}
