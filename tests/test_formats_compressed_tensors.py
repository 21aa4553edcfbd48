"""compressed-tensors: modules built here element by element, from the description of the layout."""

from __future__ import annotations

import copy
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.formats import compressed_tensors as ct
from jaxdeploy.formats.quantized import ChannelQuantized, GroupQuantized

Array = np.ndarray[Any, Any]
N, K, GROUP = 12, 64, 16
G = K // GROUP
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP, "strategy": "group", "actorder": None}
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "group_size": None}


def config_of(form: str = "pack-quantized", activations: Any = None, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "sparsity_config": {},
    }


BY_CHANNEL: dict[str, Any] = {"num_bits": 8, "strategy": "channel", "group_size": None}
INT8 = config_of("int-quantized", BY_TOKEN, **BY_CHANNEL)


def word(signed: list[int]) -> int:
    return sum((value + 8) << (4 * place) for place, value in enumerate(signed))


def along_inputs(signed: Array) -> Array:
    """int8 [N, X] → int32 [N, X / 8]."""
    rows = [[word([int(v) for v in row[c : c + 8]]) for c in range(0, len(row), 8)] for row in signed]
    return np.array(rows, np.uint32).view(np.int32)


def along_outputs(signed: Array) -> Array:
    """int8 [N, G] → int32 [N / 8 rounded up, G]; what is missing in the last word is 0."""
    words = [
        [word([int(v) for v in signed[r : r + 8, g]]) for g in range(signed.shape[1])] for r in range(0, len(signed), 8)
    ]
    return np.array(words, np.uint32).view(np.int32)


def drawn(symmetric: bool, dtype: Any = np.float16) -> tuple[Array, Array, Array]:
    """Signed q [N, K] and zero points [N, G], and the scales."""
    random = np.random.default_rng(0)
    q, zeros = random.integers(-8, 8, (N, K), np.int8), random.integers(-8, 8, (N, G), np.int8)
    return q, zeros if not symmetric else zeros * np.int8(0), random.uniform(0.01, 0.1, (N, G)).astype(dtype)


def stored(weight: tuple[Array, Array, Array], symmetric: bool, groups: list[int] | None = None) -> dict[str, Array]:
    """What a file has."""
    q, zeros, scales = weight
    arrays = {"weight_packed": along_inputs(q), "weight_scale": scales, "weight_shape": np.array([N, K], np.int64)}
    arrays |= {} if symmetric else {"weight_zero_point": along_outputs(zeros)}
    return arrays | ({} if groups is None else {"weight_g_idx": np.array(groups, np.int32)})


SCATTERED = [(3 * k + 1) % G for k in range(K)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [None, SCATTERED])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_decode_and_encode(symmetric: bool, groups: list[int] | None, dtype: Any) -> None:
    weight = q, zeros, scales = drawn(symmetric, dtype)
    built, config = stored(weight, symmetric, groups), config_of(symmetric=symmetric)
    ct.check(config)
    decoded = ct.decode(built, N, K, config)
    assert isinstance(decoded, GroupQuantized)
    np.testing.assert_array_equal(decoded.q, q + 8)
    np.testing.assert_array_equal(decoded.zeros, zeros + 8)
    np.testing.assert_array_equal(decoded.scales, scales, strict=True)
    assert (None if decoded.groups is None else decoded.groups.tolist()) == groups
    value = decoded.value()
    for n, k in ((0, 0), (3, 17), (11, 63)):
        g = k // GROUP if groups is None else groups[k]
        assert value[n, k] == np.float32(int(q[n, k]) - int(zeros[n, g])) * np.float32(scales[n, g])
    encoded, specs = ct.encode(decoded, config), ct.tensors(N, K, config)
    assert encoded.keys() == built.keys()
    for suffix, array in built.items():
        np.testing.assert_array_equal(encoded[suffix], array, strict=True)
        assert specs[suffix].shape == array.shape
    assert {suffix for suffix, spec in specs.items() if spec.optional} == {"weight_g_idx", "weight_shape"}
    assert ("weight_zero_point" in specs) != symmetric


def test_another_order_is_noticed() -> None:
    weight = q, zeros, _ = drawn(False)
    built = stored(weight, False)
    built["weight_packed"] = built["weight_packed"].byteswap()
    built["weight_zero_point"] = along_outputs(zeros[::-1])
    decoded = ct.decode(built, N, K, config_of(symmetric=False))
    assert isinstance(decoded, GroupQuantized)
    assert (decoded.q != q + 8).any()
    assert (decoded.zeros != zeros + 8).any()


def test_channels() -> None:
    config = config_of(strategy="channel", group_size=None)
    ct.check(config)
    assert ct.group_count(K, config) == 1
    assert ct.group_count(K, config_of(strategy=None, group_size=-1)) == 1
    assert ct.group_count(K, config_of(strategy=None)) == G
    assert ct.tensors(N, K, config)["weight_scale"].shape == (N, 1)


def test_inputs_that_do_not_fill_the_last_word() -> None:
    config = config_of(strategy="channel", group_size=None)
    weight = GroupQuantized(
        np.arange(2 * 12, dtype=np.uint8).reshape(2, 12) % np.uint8(16),
        np.ones((2, 1), np.float16),
        np.full((2, 1), 8, np.uint8),
        4,
    )
    arrays = ct.encode(weight, config)
    assert arrays["weight_packed"].shape == ct.tensors(2, 12, config)["weight_packed"].shape == (2, 2)
    decoded = ct.decode(arrays, 2, 12, config)
    np.testing.assert_array_equal(decoded.q, weight.q)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_int8(dtype: Any) -> None:
    ct.check(INT8)
    random = np.random.default_rng(1)
    q, scales = random.integers(-128, 128, (N, K), np.int8), random.uniform(0.01, 0.1, (N, 1)).astype(dtype)
    decoded = ct.decode({"weight": q, "weight_scale": scales}, N, K, INT8)
    assert isinstance(decoded, ChannelQuantized)
    assert decoded.scales.dtype == np.float32
    np.testing.assert_array_equal(decoded.value(), q.astype(np.float32) * scales.astype(np.float32))
    encoded = ct.encode(decoded, INT8)
    np.testing.assert_array_equal(encoded["weight"], q, strict=True)
    np.testing.assert_array_equal(encoded["weight_scale"], scales.astype(np.float32), strict=True)
    assert {suffix: spec.shape for suffix, spec in ct.tensors(N, K, INT8).items()} == {
        "weight": (N, K),
        "weight_scale": (N, 1),
    }
    assert ct.group_count(K, INT8) is None


def test_shape_of_another_model() -> None:
    built = stored(drawn(True), True) | {"weight_shape": np.array([K, N])}
    with pytest.raises(
        CheckpointError, match=r"weight_shape=\(64, 12\) must be \(12, 64\); config\.json is of another"
    ):
        ct.decode(built, N, K, config_of())


def two_groups() -> dict[str, Any]:
    config = config_of()
    config["config_groups"]["group_1"] = copy.deepcopy(config["config_groups"]["group_0"])
    return config


def some_targets() -> dict[str, Any]:
    config = config_of()
    config["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    return config


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (two_groups(), r"config_groups=\['group_0', 'group_1'\]"),
        ({"format": "pack-quantized"}, r"config_groups=\[\]"),
        (some_targets(), r"targets=\['re:\.\*mlp\.\*'\]"),
        (config_of("float-quantized"), "format=float-quantized"),
        (config_of("marlin-24"), "format=marlin-24"),
        (config_of(num_bits=8), r"weights\.num_bits=8"),
        (config_of(num_bits=3), r"weights\.num_bits=3"),
        (config_of(type="float"), r"weights\.type=float"),
        (config_of(strategy="tensor", group_size=None), r"weights\.strategy=tensor"),
        (config_of(strategy=None, group_size=None), r"weights\.strategy=tensor"),
        (config_of(group_size=None), r"weights\.group_size=None"),
        (config_of(activations=BY_TOKEN), "input_activations of 8 bits beside 4-bit weights"),
        (config_of("int-quantized", BY_TOKEN, strategy="channel", group_size=None), r"weights\.num_bits=4"),
        (
            config_of("int-quantized", BY_TOKEN, **BY_CHANNEL, symmetric=False),
            r"weights\.symmetric=False",
        ),
        (config_of("int-quantized", BY_TOKEN, num_bits=8), r"weights\.strategy=group"),
        (config_of("int-quantized", **BY_CHANNEL), r"input_activations\.strategy=tensor"),
        (
            config_of("int-quantized", {**BY_TOKEN, "dynamic": False}, **BY_CHANNEL),
            r"input_activations\.dynamic=False",
        ),
        ({**config_of(), "sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format=sparse-24"),
        ({**config_of(), "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ],
)
def test_refusals(config: dict[str, Any], found: str) -> None:
    message = rf"^{found}\S* is not supported in a compressed-tensors checkpoint; supported are pack-quantized int4 "
    with pytest.raises(UnsupportedModelError, match=message):
        ct.check(config)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedModelError, match=r"group_size=16 must be -1 or divide the 24 inputs"):
        ct.tensors(N, 24, config_of())


def test_describe_four_bits() -> None:
    described = ct.describe(
        bits=4, group_size=32, symmetric=False, act_order=True, skipped=["lm_head", "mlp.down_proj"]
    )
    ct.check(described)
    assert described == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "actorder": "group",
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", r"re:(.*\.)?mlp\.down_proj$"],
        "kv_cache_scheme": None,
    }


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (8, 128)])
def test_describe_channels(bits: int, group_size: int) -> None:
    described = ct.describe(bits=bits, group_size=group_size, symmetric=True, act_order=True, skipped=())
    ct.check(described)
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["actorder"]) == ("channel", None, None)
    assert ct.group_count(K, described) == (1 if bits == 4 else None)
