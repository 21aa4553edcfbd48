"""compressed-tensors as llm-compressor stores it: 4-bit weights packed (W4A16), or int8 weights (W8A8).

"pack-quantized", per module: ``weight_packed`` int32 [N, K / 8], packed along the inputs; ``weight_scale`` [N, G];
``weight_zero_point`` int32 [N / 8, G], packed along the outputs, where not symmetric; ``weight_g_idx`` int32 [K] where
groups are of scattered inputs; ``weight_shape`` [2]. Integers are signed there, stored with 8 added: what is stored
is what ``GroupQuantized`` has.

"int-quantized", per module: ``weight`` int8 [N, K] and ``weight_scale`` [N, 1], symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.files.stored import shown
from jaxdeploy.formats.groups import count_groups, read_groups
from jaxdeploy.formats.quantized import Array, ChannelQuantized, GroupQuantized, TensorSpec
from jaxdeploy.formats.skipped import skipping_pattern
from jaxdeploy.formats.words import pack, unpack, words_for

GROUPS = "weight_g_idx"

_PACKED, _INT8 = "pack-quantized", "int-quantized"
_BITS = 4
_SUPPORTED = (
    "supported are pack-quantized int4 weights by group or channel with float activations, and int-quantized int8 "
    "weights by channel with int8 activations by token, one group of them for all Linear modules"
)


def check(config: Mapping[str, Any]) -> None:
    """Raises ``UnsupportedModelError``: what is not supported, and what is."""
    _check_types(config)
    if found := next(_unsupported(config), None):
        raise UnsupportedModelError(f"{found} is not supported in a compressed-tensors checkpoint; {_SUPPORTED}")


def group_count(inputs: int, config: Mapping[str, Any]) -> int | None:
    """G of a module, ``None`` for int8. Raises ``UnsupportedModelError``: the group size does not divide its inputs."""
    if _format(config) == _INT8:
        return None
    weights = _weights(config)
    return count_groups(inputs, int(weights["group_size"]) if _strategy(weights) == "group" else -1)


def tensors(outputs: int, inputs: int, config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The tensors of a module by suffix. Raises ``UnsupportedModelError``: groups that do not divide its inputs."""
    groups = group_count(inputs, config)
    if groups is None:
        return {"weight": TensorSpec((outputs, inputs), "i"), "weight_scale": TensorSpec((outputs, 1), "f")}
    specs = {
        "weight_packed": TensorSpec((outputs, words_for(inputs, _BITS)), "i"),
        "weight_scale": TensorSpec((outputs, groups), "f"),
        "weight_g_idx": TensorSpec((inputs,), "i", optional=True),
        "weight_shape": TensorSpec((2,), "i", optional=True),
    }
    if not _symmetric(config):
        specs["weight_zero_point"] = TensorSpec((words_for(outputs, _BITS), groups), "i")
    return specs


def decode(
    arrays: Mapping[str, Array], outputs: int, inputs: int, config: Mapping[str, Any]
) -> GroupQuantized | ChannelQuantized:
    """A module's arrays by suffix → the weight.

    Raises ``CheckpointError``: ``weight_shape`` says otherwise, or ``weight_g_idx`` makes no groups of one size.
    """
    scales, groups = arrays["weight_scale"], group_count(inputs, config)
    if groups is None:
        return ChannelQuantized(arrays["weight"], scales.reshape(outputs).astype(np.float32))
    shape = tuple(map(int, arrays.get("weight_shape", np.array([outputs, inputs]))))
    if shape != (outputs, inputs):
        raise CheckpointError(f"weight_shape={shape} must be {(outputs, inputs)}; config.json is of another model")
    q = unpack(arrays["weight_packed"], _BITS, axis=1)[:, :inputs]
    if _symmetric(config):
        zeros = np.full(scales.shape, 1 << (_BITS - 1), np.uint8)
    else:
        zeros = unpack(arrays["weight_zero_point"], _BITS, axis=0)[:outputs]
    return GroupQuantized(q, scales, zeros, _BITS, read_groups(arrays.get("weight_g_idx"), inputs, groups))


def encode(weight: GroupQuantized | ChannelQuantized, config: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of ``decode``."""
    if isinstance(weight, ChannelQuantized):
        return {"weight": weight.q, "weight_scale": weight.scales[:, None]}
    assert weight.bits == _BITS
    arrays = {
        "weight_packed": pack(weight.q, _BITS, axis=1),
        "weight_scale": weight.scales,
        "weight_shape": np.array(weight.q.shape, np.int64),
    }
    if not _symmetric(config):
        arrays["weight_zero_point"] = pack(weight.zeros, _BITS, axis=0)
    else:
        assert (weight.zeros == weight.middle).all(), "symmetric: zero points are not stored"
    return arrays | ({} if weight.groups is None else {"weight_g_idx": weight.groups})


def describe(*, bits: int, group_size: int, symmetric: bool, act_order: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of what ``encode`` makes; ``skipped`` are module names, or their last components.

    ``lm_head`` is always among what it says to ignore: every Linear that is not would be quantised.
    """
    assert bits in (_BITS, 8)
    packed, per_channel = bits == _BITS, bits == 8 or group_size == -1
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric or not packed,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else group_size,
        "actorder": "group" if act_order and not per_channel else None,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if packed else activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _PACKED if packed else _INT8,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *(f"re:{skipping_pattern(name)}" for name in skipped if name != "lm_head")],
        "kv_cache_scheme": None,
    }


def _check_types(config: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError``: a field of another type than the format has there."""
    stored = StoredFields(config, "quantization_config")
    stored.text("format", None)
    stored.nested("sparsity_config")
    stored.nested("transform_config")
    groups = stored.nested("config_groups")
    for name in groups.values:
        group = groups.nested(name)
        group.text("format", None)
        for args in (group.nested("weights"), group.nested("input_activations")):
            args.whole("num_bits", None)
            args.whole("group_size", None, least=-1)
            for text in ("type", "strategy"):
                args.text(text, None)
            for flag in ("symmetric", "dynamic"):
                args.flag(flag, False)


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """What of ``config`` there is no code for, as ``field=value``."""
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        yield f"config_groups={shown(sorted(config.get('config_groups') or {}))}"
        return
    if groups[0].get("targets") != ["Linear"]:
        yield f"targets={shown(groups[0].get('targets'))}"
    form, weights, activations = _format(config), _weights(config), groups[0].get("input_activations")
    if form not in (_PACKED, _INT8):
        yield f"format={form}"
    wanted = {
        "num_bits": (_BITS,) if form == _PACKED else (8,),
        "type": ("int",),
        "symmetric": (True, False) if form == _PACKED else (True,),
        "strategy": ("group", "channel") if form == _PACKED else ("channel",),
        "dynamic": (False,),
    }
    yield from _misfits("weights", _filled_in(weights), wanted)
    if _strategy(weights) == "group" and not weights.get("group_size"):
        yield f"weights.group_size={weights.get('group_size')}"
    if form == _PACKED and activations:
        yield f"input_activations of {activations.get('num_bits')} bits beside 4-bit weights"
    if form == _INT8:
        by_token = {
            "num_bits": (8,), "type": ("int",), "symmetric": (True,), "strategy": ("token",), "dynamic": (True,)
        }  # fmt: skip
        yield from _misfits("input_activations", _filled_in(activations or {}), by_token)
    if (sparsity := (config.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        yield f"sparsity_config.format={sparsity}"
    if (config.get("transform_config") or {}).get("config_groups"):
        yield "transform_config"


def _misfits(name: str, args: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    yield from (f"{name}.{key}={args[key]!s:.60}" for key, known in wanted.items() if args[key] not in known)


def _filled_in(args: Mapping[str, Any]) -> dict[str, Any]:
    """With what the format takes for fields that are not there."""
    given = {name: value for name, value in args.items() if value is not None}
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    return {**defaults, **given, "strategy": _strategy(args)}


def _strategy(args: Mapping[str, Any]) -> str:
    """A group size alone says it too: −1 is a channel, none the whole tensor."""
    size = args.get("group_size")
    return str(args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group"))


def _group(config: Mapping[str, Any]) -> Mapping[str, Any]:
    group: Mapping[str, Any] = next(iter(config["config_groups"].values()))
    return group


def _weights(config: Mapping[str, Any]) -> Mapping[str, Any]:
    weights: Mapping[str, Any] = _group(config).get("weights") or {}
    return weights


def _format(config: Mapping[str, Any]) -> str:
    """Newer files say it for each group."""
    return str(_group(config).get("format") or config.get("format"))


def _symmetric(config: Mapping[str, Any]) -> bool:
    return bool(_filled_in(_weights(config))["symmetric"])
