"""AWQ as AutoAWQ's version "gemm" stores it, which LMDeploy, vLLM and transformers read.

Per module: ``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [G, N / 8], a word with outputs 0, 2, 4, 6, 1, 3, 5, 7 of
eight neighbours from its lowest bits up; ``scales`` float16 [G, N]. Zero points are there for symmetric weights too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.formats.groups import count_groups
from jaxdeploy.formats.quantized import Array, ChannelQuantized, GroupQuantized, TensorSpec
from jaxdeploy.formats.words import pack, unpack, words_for

GROUPS = None

_BITS, _ORDER = 4, (0, 2, 4, 6, 1, 3, 5, 7)


def check(config: Mapping[str, Any]) -> None:
    """Raises ``UnsupportedModelError``: other bits or another version than there is code for."""
    stored = _stored(config)
    bits = stored.whole("bits", stored.whole("w_bit", _BITS, most=64), most=64)
    if bits != _BITS:
        raise UnsupportedModelError(f"bits={bits} is not supported in an AWQ checkpoint; quantise the model to 4 bits")
    named = (stored.text(name, None) for name in ("version", "checkpoint_format", "format"))
    version = "llm-awq" if config.get("backend") == "llm-awq" else next(filter(None, named), "gemm")
    if version.lower() != "gemm":
        raise UnsupportedModelError(
            f"version={version:.60} of AWQ is not supported, only gemm; quantise the model with version gemm"
        )


def group_count(inputs: int, config: Mapping[str, Any]) -> int:
    """G of a module. Raises ``UnsupportedModelError``: the group size does not divide its inputs."""
    stored = _stored(config)
    default = stored.whole("q_group_size", 128, least=-1)
    return count_groups(inputs, stored.whole("group_size", default, least=-1))


def _stored(config: Mapping[str, Any]) -> StoredFields:
    return StoredFields(config, "quantization_config")


def tensors(outputs: int, inputs: int, config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The tensors of a module by suffix. Raises ``UnsupportedModelError``: sizes that do not divide."""
    if outputs % len(_ORDER):
        raise UnsupportedModelError(f"outputs={outputs} must be a multiple of 8 in AWQ; leave the module as floats")
    groups, words = group_count(inputs, config), words_for(outputs, _BITS)
    return {
        "qweight": TensorSpec((inputs, words), "i"),
        "qzeros": TensorSpec((groups, words), "i"),
        "scales": TensorSpec((groups, outputs), "f"),
    }


def decode(arrays: Mapping[str, Array], outputs: int, inputs: int, config: Mapping[str, Any]) -> GroupQuantized:
    """A module's arrays by suffix → the weight."""
    q, zeros = (unpack(arrays[name].T, _BITS, axis=0, order=_ORDER) for name in ("qweight", "qzeros"))
    return GroupQuantized(q, np.ascontiguousarray(arrays["scales"].T), zeros, _BITS)


def encode(weight: GroupQuantized | ChannelQuantized, config: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of ``decode``."""
    assert isinstance(weight, GroupQuantized)
    assert weight.bits == _BITS
    assert weight.groups is None, "AWQ has no groups of scattered inputs"
    return {
        "qweight": np.ascontiguousarray(pack(weight.q, _BITS, axis=0, order=_ORDER).T),
        "qzeros": np.ascontiguousarray(pack(weight.zeros, _BITS, axis=0, order=_ORDER).T),
        "scales": np.ascontiguousarray(weight.scales.T),
    }


def describe(*, bits: int, group_size: int, symmetric: bool, act_order: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of what ``encode`` makes; ``skipped`` are module names, or their last components."""
    assert bits == _BITS
    assert not act_order
    described = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": bits,
        "group_size": group_size,
        "zero_point": not symmetric,
    }
    return described | ({"modules_to_not_convert": list(skipped)} if skipped else {})
