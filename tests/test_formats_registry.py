"""Choosing a format, what all of them have in common, and SmoothQuant, which is little more than two arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.formats import smooth_quant
from jaxdeploy.formats.quantized import ChannelQuantized, GroupQuantized
from jaxdeploy.formats.registry import FORMATS, format_named, format_of, is_skipped, quantization_of

Array = np.ndarray[Any, Any]
GROUPED = [("awq", 4), ("gptq", 3), ("gptq", 4), ("gptq_v2", 3), ("gptq_v2", 4), ("compressed-tensors", 4)]


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(GROUPED),
    outputs=st.integers(1, 3),
    groups=st.integers(1, 4),
    symmetric=st.booleans(),
    scattered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_what_is_encoded_is_decoded(
    layout: tuple[str, int], outputs: int, groups: int, symmetric: bool, scattered: bool, seed: int
) -> None:
    (name, bits), random = layout, np.random.default_rng(seed)
    n, k, chosen = 32 * outputs, 32 * groups, format_named(name)
    scattered = scattered and chosen.GROUPS is not None and groups > 1
    order = random.permutation(np.arange(k) // 32).astype(np.int32) if scattered else None
    zeros = random.integers(0, 1 << bits, (n, groups), np.uint8)
    weight = GroupQuantized(
        random.integers(0, 1 << bits, (n, k), np.uint8),
        random.uniform(1e-3, 1, (n, groups)).astype(np.float16),
        np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros,
        bits,
        order,
    )
    config = chosen.describe(bits=bits, group_size=32, symmetric=symmetric, act_order=scattered, skipped=())
    assert format_of(config).decode.__code__ is chosen.decode.__code__
    chosen.check(config)
    arrays = chosen.encode(weight, config)
    specs = chosen.tensors(n, k, config)
    assert {suffix: specs[suffix].shape for suffix in arrays} == {suffix: a.shape for suffix, a in arrays.items()}
    assert all(specs[suffix].kind == array.dtype.kind for suffix, array in arrays.items())
    assert chosen.group_count(k, config) == groups
    decoded = chosen.decode(arrays, n, k, config)
    assert isinstance(decoded, GroupQuantized)
    for field in ("q", "scales", "zeros", *(["groups"] if scattered else [])):
        np.testing.assert_array_equal(getattr(decoded, field), getattr(weight, field), strict=True)
    assert (decoded.groups is None) == (order is None)
    np.testing.assert_array_equal(decoded.value(), weight.value())
    again = chosen.encode(decoded, config)
    assert all(np.array_equal(again[suffix], array) for suffix, array in arrays.items())


@pytest.mark.parametrize("name", ["smooth_quant", "compressed-tensors"])
def test_int8_that_is_encoded_is_decoded(name: str) -> None:
    random, chosen = np.random.default_rng(0), format_named(name)
    weight = ChannelQuantized(random.integers(-127, 128, (5, 7), np.int8), random.random(5, np.float32))
    config = chosen.describe(bits=8, group_size=128, symmetric=True, act_order=False, skipped=())
    chosen.check(config)
    decoded = chosen.decode(chosen.encode(weight, config), 5, 7, config)
    assert isinstance(decoded, ChannelQuantized)
    np.testing.assert_array_equal(decoded.q, weight.q, strict=True)
    np.testing.assert_array_equal(decoded.scales, weight.scales, strict=True)


def test_smooth_quant_as_lmdeploy_stores_it() -> None:
    q = np.array([[-127, 3], [4, 100]], np.int8)
    arrays: dict[str, Array] = {"weight": q, "scale": np.array([[0.5], [0.25]], np.float32)}
    config = {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    smooth_quant.check(config)
    smooth_quant.check({"quant_method": "smooth_quant"})
    decoded = smooth_quant.decode(arrays, 2, 2, config)
    np.testing.assert_array_equal(decoded.q, q)
    assert decoded.scales.tolist() == [0.5, 0.25]
    assert decoded.value().tolist() == [[-63.5, 1.5], [1.0, 25.0]]
    specs = smooth_quant.tensors(2, 2, config)
    assert {suffix: (spec.shape, spec.kind) for suffix, spec in specs.items()} == {
        "weight": ((2, 2), "i"),
        "scale": ((2, 1), "f"),
    }
    assert smooth_quant.describe(bits=8, group_size=-1, symmetric=True, act_order=False, skipped=()) == config
    kept = smooth_quant.describe(bits=8, group_size=-1, symmetric=True, act_order=False, skipped=["w2"])
    assert kept["modules_to_not_convert"] == ["w2"]


def test_smooth_quant_of_another_dtype() -> None:
    message = r"quant_dtype=float8_e4m3fn is not supported in a SmoothQuant checkpoint; quantise"
    with pytest.raises(UnsupportedModelError, match=message):
        smooth_quant.check({"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"})


@pytest.mark.parametrize(
    ("module", "config", "skipped"),
    [
        ("lm_head", {"modules_to_not_convert": ["lm_head"]}, True),
        ("model.layers.3.mlp.down_proj", {"modules_to_not_convert": ["mlp.down_proj"]}, True),
        ("model.layers.3.mlp.down_proj", {"modules_to_not_convert": ["down_proj"]}, True),
        ("model.layers.3.mlp.down_proj", {"modules_to_not_convert": ["mlp"]}, True),
        ("model.layers.3.mlp.down_proj", {"modules_to_not_convert": ["model.layers.3"]}, True),
        ("model.layers.31.mlp.down_proj", {"modules_to_not_convert": ["model.layers.3"]}, False),
        ("model.layers.3.mlp.gate_proj", {"modules_to_not_convert": ["gate"]}, False),
        ("model.layers.3.mlp.down_proj", {"modules_to_not_convert": None}, False),
        ("model.layers.3.mlp.down_proj", {}, False),
        ("lm_head", {"ignore": ["lm_head"]}, True),
        ("model.lm_head", {"ignore": ["lm_head"]}, False),
        ("model.layers.3.mlp.down_proj", {"ignore": ["re:.*down_proj"]}, True),
        ("model.layers.3.mlp.down_proj", {"ignore": ["re:down_proj"]}, False),
        ("model.layers.3.mlp.down_proj", {"ignore": ["mlp.down_proj"]}, False),
        ("model.layers.3.mlp.down_proj", {"dynamic": {r"-:.*\.down_proj": {}}}, True),
        ("model.layers.3.mlp.down_proj", {"dynamic": {r"+:.*\.down_proj": {"bits": 8}}}, False),
        ("model.layers.3.mlp.down_proj", {"dynamic": None, "ignore": None}, False),
    ],
)
def test_skipped(module: str, config: dict[str, Any], skipped: bool) -> None:
    assert is_skipped(module, config) == skipped


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_described_as_skipped_is_skipped(name: str) -> None:
    bits = 8 if name == "smooth_quant" else 4
    names = ["mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    config = format_named(name).describe(bits=bits, group_size=32, symmetric=True, act_order=False, skipped=names)
    modules = ("model.layers.7.mlp.down_proj", "model.layers.0.self_attn.q_proj")
    assert all(is_skipped(module, config) for module in modules)
    others = ("model.layers.7.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.7.mlp.down_proj_2")
    assert not any(is_skipped(module, config) for module in others)


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", None])
def test_unknown_methods(method: str | None) -> None:
    message = (
        rf"^quant_method={method} is not supported; give the float model, or one stored as awq, gptq, gptq_v2, comp"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        format_of({"quant_method": method})


def test_what_config_json_says() -> None:
    gptq = {"quant_method": "gptq", "bits": 4}
    assert quantization_of({}) is None
    assert quantization_of({"quantization_config": None}, "hf") is None
    assert quantization_of({"quantization_config": gptq}) == gptq
    assert quantization_of({"quantization_config": gptq}, "hf") == gptq
    assert quantization_of({"compression_config": gptq}) == gptq
    assert quantization_of({}, "awq") == {"quant_method": "awq"}
    assert quantization_of({"quantization_config": gptq}, "awq") == {"quant_method": "awq", "bits": 4}
    v2 = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4}
    assert quantization_of({"quantization_config": gptq}, "gptq_v2") == v2


def test_transformers_reads_what_is_described() -> None:
    from transformers.utils.quantization_config import AwqConfig, GPTQConfig

    settings: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": True, "act_order": False}
    awq = AwqConfig.from_dict(format_named("awq").describe(**settings, skipped=["mlp.down_proj"]))
    assert (awq.bits, awq.group_size, awq.zero_point, awq.format) == (4, 64, False, "gemm")
    assert awq.modules_to_not_convert == ["mlp.down_proj"]
    for name in ("gptq", "gptq_v2"):
        gptq = GPTQConfig.from_dict(format_named(name).describe(**settings, skipped=["mlp.down_proj"]))
        assert (gptq.bits, gptq.group_size, gptq.sym, gptq.desc_act, gptq.format) == (4, 64, True, False, name)
