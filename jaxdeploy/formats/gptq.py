"""GPTQ as AutoGPTQ and GPTQModel store it.

Per module: ``qweight`` int32 [K · bits / 32, N], packed along the inputs; ``qzeros`` int32 [G, N · bits / 32], packed
along the outputs; ``scales`` float16 [G, N]; ``g_idx`` int32 [K], the group of each input.

``checkpoint_format`` "gptq_v2" stores zero points as they are. "gptq" (v1, the default) stores them less one, modulo
2^bits; for 4 bits GPTQModel takes 1 eight times from the whole word, so that a zero point of 0 borrows from the next,
and so do we. The two agree on all others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.files.stored import shown
from jaxdeploy.formats.groups import count_groups, in_order, read_groups
from jaxdeploy.formats.quantized import Array, ChannelQuantized, GroupQuantized, TensorSpec
from jaxdeploy.formats.skipped import skipping_pattern
from jaxdeploy.formats.words import pack, unpack, words_for

logger = logging.getLogger("jaxdeploy")

GROUPS = "g_idx"

_BITS = (3, 4)
_ONE_IN_EACH = np.uint32(0x1111_1111)


def check(config: Mapping[str, Any]) -> None:
    """Raises ``UnsupportedModelError``: bits, a layout or overrides for single modules that there is no code for."""
    bits = _bits(config)
    if bits not in _BITS:
        raise UnsupportedModelError(
            f"bits={bits} is not supported in a GPTQ checkpoint, only 3 and 4; quantise the model to one of these"
        )
    if _version(config) not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(
            f"checkpoint_format={_version(config)} is not supported, only gptq and gptq_v2; quantise the model to these"
        )
    _stored(config).flag("sym", True)
    dynamic = _stored(config).nested("dynamic")
    for pattern in dynamic.values:
        override = dynamic.nested(pattern).values
        for name in () if pattern.startswith("-:") else ("bits", "group_size"):
            if override.get(name, config.get(name)) != config.get(name):
                raise UnsupportedModelError(
                    f"dynamic={shown(pattern)} gives modules a {name} of their own, which is not supported; "
                    f"quantise the model with {name}={config.get(name)} everywhere"
                )


def group_count(inputs: int, config: Mapping[str, Any]) -> int:
    """G of a module. Raises ``UnsupportedModelError``: the group size does not divide its inputs."""
    return count_groups(inputs, _stored(config).whole("group_size", 128, least=-1))


def tensors(outputs: int, inputs: int, config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The tensors of a module by suffix. Raises ``UnsupportedModelError``: sizes that do not divide."""
    groups, bits = group_count(inputs, config), _bits(config)
    run = 32 if bits == 3 else 8
    if outputs % run or inputs % run:
        raise UnsupportedModelError(
            f"outputs={outputs} and inputs={inputs} must be multiples of {run} in GPTQ of {bits} bits; "
            "leave the module as floats"
        )
    return {
        "qweight": TensorSpec((words_for(inputs, bits), outputs), "i"),
        "qzeros": TensorSpec((groups, words_for(outputs, bits)), "i"),
        "scales": TensorSpec((groups, outputs), "f"),
        "g_idx": TensorSpec((inputs,), "i", optional=True),
    }


def decode(arrays: Mapping[str, Array], outputs: int, inputs: int, config: Mapping[str, Any]) -> GroupQuantized:
    """A module's arrays by suffix → the weight.

    A file that calls itself v1 and symmetric but has the middle in all zero points is v2: so it is read.

    Raises ``CheckpointError``: ``g_idx`` makes no groups of one size.
    """
    bits = _bits(config)
    return GroupQuantized(
        unpack(arrays["qweight"].T, bits, axis=1),
        np.ascontiguousarray(arrays["scales"].T),
        np.ascontiguousarray(_read_zeros(arrays["qzeros"], bits, config).T),
        bits,
        read_groups(arrays.get("g_idx"), inputs, group_count(inputs, config)),
    )


def encode(weight: GroupQuantized | ChannelQuantized, config: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of ``decode``."""
    assert isinstance(weight, GroupQuantized)
    assert weight.bits == _bits(config)
    assert not config.get("sym", True) or (weight.zeros == weight.middle).all(), "sym: readers ignore the zero points"
    inputs, count = weight.q.shape[1], weight.scales.shape[1]
    return {
        "qweight": np.ascontiguousarray(pack(weight.q, weight.bits, axis=1).T),
        "qzeros": _stored_zeros(weight.zeros.T, weight.bits, config),
        "scales": np.ascontiguousarray(weight.scales.T),
        "g_idx": in_order(inputs, count) if weight.groups is None else weight.groups,
    }


def describe(*, bits: int, group_size: int, symmetric: bool, act_order: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of what ``encode`` makes; ``skipped`` are module names, or their last components."""
    assert bits in _BITS
    described = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "lm_head": False,
    }
    return described | ({"dynamic": {f"-:{skipping_pattern(name)}": {} for name in skipped}} if skipped else {})


def _stored(config: Mapping[str, Any]) -> StoredFields:
    return StoredFields(config, "quantization_config")


def _bits(config: Mapping[str, Any]) -> int:
    return _stored(config).whole("bits", 4, most=64)


def _version(config: Mapping[str, Any]) -> str:
    stored = _stored(config)
    return (stored.text("checkpoint_format", None) or stored.text("format", None) or "gptq").lower()


def _read_zeros(qzeros: Array, bits: int, config: Mapping[str, Any]) -> Array:
    """uint8 [G, N]."""
    stored = unpack(qzeros, bits, axis=1)
    if _version(config) == "gptq_v2":
        return stored
    if config.get("sym", True) and (stored == 1 << (bits - 1)).all():
        _say_that_it_is_v2()
        return stored
    if bits == 4:
        return unpack(np.ascontiguousarray(qzeros, np.int32).view(np.uint32) + _ONE_IN_EACH, bits, axis=1)
    return (stored + np.uint8(1)) & np.uint8((1 << bits) - 1)


def _stored_zeros(zeros: Array, bits: int, config: Mapping[str, Any]) -> Array:
    """int32, from [G, N]."""
    if _version(config) == "gptq_v2":
        return pack(zeros, bits, axis=1)
    if bits == 4:
        return (pack(zeros, bits, axis=1).view(np.uint32) - _ONE_IN_EACH).view(np.int32)
    return pack((zeros - np.uint8(1)) & np.uint8((1 << bits) - 1), bits, axis=1)


@functools.cache
def _say_that_it_is_v2() -> None:
    """Once, not for each module."""
    logger.warning("checkpoint_format=gptq, but the zero points are stored as gptq_v2 does: they are read as that")
