"""SmoothQuant as LMDeploy stores it: ``weight`` int8 [N, K] and ``scale`` float32 [N, 1] per module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.formats.quantized import Array, ChannelQuantized, GroupQuantized, TensorSpec

GROUPS = None


def check(config: Mapping[str, Any]) -> None:
    """Raises ``UnsupportedModelError``: the weights are not int8."""
    dtype = StoredFields(config, "quantization_config").text("quant_dtype", "int8")
    if dtype != "int8":
        raise UnsupportedModelError(
            f"quant_dtype={dtype:.60} is not supported in a SmoothQuant checkpoint; quantise the model to int8"
        )


def group_count(inputs: int, config: Mapping[str, Any]) -> None:
    """``None``: an output has one scale."""


def tensors(outputs: int, inputs: int, config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The tensors of a module by suffix."""
    return {"weight": TensorSpec((outputs, inputs), "i"), "scale": TensorSpec((outputs, 1), "f")}


def decode(arrays: Mapping[str, Array], outputs: int, inputs: int, config: Mapping[str, Any]) -> ChannelQuantized:
    """A module's arrays by suffix → the weight."""
    return ChannelQuantized(arrays["weight"], arrays["scale"].reshape(outputs).astype(np.float32))


def encode(weight: GroupQuantized | ChannelQuantized, config: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of ``decode``."""
    assert isinstance(weight, ChannelQuantized)
    return {"weight": weight.q, "scale": weight.scales[:, None]}


def describe(*, bits: int, group_size: int, symmetric: bool, act_order: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of what ``encode`` makes; ``skipped`` are module names, or their last components."""
    assert bits == 8
    described = {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    return described | ({"modules_to_not_convert": list(skipped)} if skipped else {})
