"""Checkpoints with quantised linear maps → decoders that hold them as they are, or say why not."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdeploy.checkpoint.model import LoadOptions, load_model
from jaxdeploy.checkpoint.quantized import expand_quantized
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json
from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.quantized import Int4Weight, Int8Weight
from jaxdeploy.models.registry import family_of, read_config
from jaxdeploy.parallel.mesh import make_mesh
from tests.stored_models import (
    AWQ,
    GPTQ,
    INT8_LAYOUTS,
    LAYOUTS,
    LINEARS,
    LLAMA,
    NARROW,
    SCATTERED,
    SUMMED_APART,
    Layout,
    apart,
    awq_config,
    checkpoint,
    gptq_config,
    hf_of,
    kinds,
    logits,
    store_awq,
    store_gptq,
    weights_of,
)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "jaxdeploy")
    return caplog


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_if_they_were_floats(name: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    layout = LAYOUTS[name]
    stored = checkpoint(layout)
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["int4"] * 4] * 2
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    assert not said.messages
    scattered = layout.inputs == "scattered"
    for weight, width in zip(weights_of(decoder), (128, 128, 128, 256), strict=True):
        leaves = nnx.to_flat_state(nnx.state(weight))
        assert [path[0] for path, _ in leaves] == (["order"] if scattered else []) + ["packed"]
        assert weight.packed[...].dtype == jnp.int32
        assert weight.packed[...].shape[:2] == (width // 128, 16 + 128 // (layout.group or 128))
        assert weight.takes_as_is != scattered


def test_a_zero_point_that_is_off_by_one_is_noticed(tmp_path: Path) -> None:
    stored = checkpoint(GPTQ)
    stored.hf["quantization_config"] = gptq_config(64, checkpoint_format="gptq_v2")
    assert apart(logits(stored.load(tmp_path)), logits(stored.floats())) > 1000 * SUMMED_APART


def test_read_as_floats(tmp_path: Path) -> None:
    """Every parameter, for those who need no speed."""
    stored = checkpoint(AWQ, keep=("lm_head", "layers.1.self_attn.k_proj"))
    stored.load(tmp_path)
    table, files = family_of(stored.hf).weights(read_config(stored.hf)), open_checkpoint(tmp_path)
    sources = expand_quantized(table, files, AWQ.config)
    assert sources.keys() == table.keys()
    for path, source in sources.items():
        array = source.assemble([files[name].read() for name in source.names])
        truth = table[path].assemble([stored.values[name] for name in table[path].names])
        np.testing.assert_array_equal(array, truth, strict=True)


@pytest.mark.parametrize(
    ("architecture", "layout"), [("InternLM2ForCausalLM", AWQ), ("Qwen2ForCausalLM", GPTQ), ("LlamaForCausalLM", AWQ)]
)
def test_families(architecture: str, layout: Layout, tmp_path: Path) -> None:
    """Query, key and value in one module; with biases; with biases everywhere."""
    everywhere = {"attention_bias": True, "mlp_bias": True} if architecture == "LlamaForCausalLM" else {}
    stored = checkpoint(layout, {**hf_of(architecture), **everywhere})
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["int4"] * 4] * 2
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART


@pytest.mark.parametrize(
    ("layout", "group"),
    [
        (Layout(awq_config(32), store_awq, group=32), 32),
        (Layout(awq_config(-1), store_awq, group=None), 128),
        (replace(SCATTERED, config=gptq_config(32), group=32), 32),
    ],
)
def test_inputs_that_are_no_multiple_of_128(layout: Layout, group: int, tmp_path: Path) -> None:
    """64 and 192: weights are filled up, and so are activations."""
    stored = checkpoint(layout, NARROW)
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["int4"] * 4] * 2
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    down = weights_of(decoder)[3]
    assert down.packed[...].shape == (2, 16 + 128 // group, 64)
    assert not down.takes_as_is


def test_groups_that_the_packed_form_has_not(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """96 of 192 are three of 32 each, all 96 are one of 128; 16 are none."""
    wide = hf_of("LlamaForCausalLM", hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    stored = checkpoint(Layout(awq_config(96), store_awq, group=96), {**wide, "intermediate_size": 192})
    decoder = stored.load(tmp_path)
    assert [weight.packed[...].shape[1] for weight in weights_of(decoder)] == [17, 17, 17, 20]
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    assert not said.messages
    fine = checkpoint(Layout(awq_config(16), store_awq, group=16))
    assert kinds(fine.load(tmp_path)) == [["float"] * 4] * 2
    assert said.messages == ["quantised linear maps expanded to floats: 8; groups of 16 inputs are no multiple of 32"]


@pytest.mark.parametrize("name", INT8_LAYOUTS)
def test_int8(name: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    stored = checkpoint(INT8_LAYOUTS[name])
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["int8"] * 4] * 2
    assert not said.messages
    down, module = weights_of(decoder, 1)[3], "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(down.values[...], stored.tensors[f"{module}.weight"], strict=True)
    assert down.scales[...].dtype == jnp.float32
    found, rounded, exact = logits(decoder), logits(rounding(stored.floats())), logits(stored.floats())
    by_token = np.abs(found - rounded).max(axis=-1) / np.abs(rounded).max()
    # An input just between two steps may be rounded either way; that reaches the tokens behind it.
    assert np.median(by_token) < SUMMED_APART
    assert by_token.max() < apart(rounded, exact) / 3
    assert apart(rounded, exact) > 100 * SUMMED_APART, "activations that are not rounded are noticed"


class Rounding(nnx.Module):
    """A float weight whose inputs are rounded per token, to 127 steps either way."""

    def __init__(self, weight: nnx.Param[jax.Array], inputs: int) -> None:
        self.weight, self.inputs = weight, inputs

    def multiply(self, x: jax.Array) -> jax.Array:
        step = jnp.abs(x).max(axis=1, keepdims=True) / 127
        weight = self.weight[...]
        matrix = weight.reshape(x.shape[1], *weight.shape[self.inputs :])
        return jnp.tensordot(jnp.round(x / step) * step, matrix, axes=1)


def rounding(decoder: Decoder) -> Decoder:
    """Make a float ``decoder`` round what goes into linear maps."""
    for layer in decoder.layers:
        for module, name in zip((layer.attention, layer.attention, layer.mlp, layer.mlp), LINEARS, strict=True):
            setattr(module, name, Rounding(getattr(module, name), 2 if name == "wo" else 1))
    return decoder


def test_orders_that_differ(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """Query, key and value are one product of one input."""
    stored = checkpoint(replace(SCATTERED, inputs="scattered apart"))
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["float", "int4", "float", "int4"]] * 2
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    assert said.messages == [
        "quantised linear maps expanded to floats: 2; q_proj, k_proj, v_proj order their inputs differently",
        "quantised linear maps expanded to floats: 2; gate_proj, up_proj order their inputs differently",
    ]


def test_a_module_that_is_a_float(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """Though ``config.json`` does not say so: the tensors do."""
    stored = checkpoint(GPTQ, keep=("lm_head", "layers.1.self_attn.k_proj"))
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["int4"] * 4, ["float", "int4", "int4", "int4"]]
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    (message,) = said.messages
    assert message == "quantised linear maps expanded to floats: 1; q_proj, k_proj, v_proj are not stored alike"


def test_modules_to_leave_alone(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    left = {"modules_to_not_convert": ["lm_head", "mlp.down_proj", "model.layers.1"]}
    stored = checkpoint(Layout(awq_config(64, **left), store_awq), keep=("lm_head", "mlp.down_proj", "layers.1."))
    decoder = stored.load(tmp_path)
    assert kinds(decoder) == [["int4", "int4", "int4", "float"], ["float"] * 4]
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    assert not said.messages


def test_a_quantised_head(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    stored = checkpoint(replace(GPTQ, config=gptq_config(64, lm_head=True)), keep=())
    assert "lm_head.qweight" in stored.tensors
    decoder = stored.load(tmp_path)
    assert isinstance(decoder.head.weight, nnx.Param)
    assert decoder.head.weight[...].dtype == jnp.float32
    assert apart(logits(decoder), logits(stored.floats())) < SUMMED_APART
    assert said.messages == [
        "quantised linear maps expanded to floats: 1; only the linear maps of layers have kernels for integers"
    ]


def test_biases_of_zeros(tmp_path: Path) -> None:
    """AutoGPTQ gives one to every module."""
    stored = checkpoint(GPTQ)
    right = logits(stored.floats())
    names = [name.replace("qweight", "bias") for name in stored.tensors if name.endswith("qweight")]
    stored.tensors.update({name: np.zeros(4, np.float16) for name in names})
    assert apart(logits(stored.load(tmp_path)), right) < SUMMED_APART
    stored.tensors[names[3]] = np.ones(4, np.float16)
    with pytest.raises(CheckpointError, match=rf"mend config\.json:\s+{names[3]}: unexpected$"):
        stored.load(tmp_path)


def test_all_faults_at_once(tmp_path: Path) -> None:
    stored, layer = checkpoint(AWQ).without("model.layers.0.self_attn.q_proj.qzeros"), "model.layers.1"
    stored = stored.without(f"{layer}.self_attn.o_proj.scales")
    stored.tensors[f"{layer}.mlp.down_proj.scales"] = np.zeros((2, 128), np.float16)
    stored.tensors[f"{layer}.mlp.up_proj.qweight"] = np.zeros((128, 32), np.float32)
    stored.tensors[f"{layer}.mlp.up_proj.g_idx"] = np.zeros(128, np.int32)
    with pytest.raises(CheckpointError) as caught:
        stored.load(tmp_path)
    assert [line.removeprefix("  ") for line in str(caught.value).splitlines()[1:]] == [
        "model.layers.0.self_attn.q_proj.qzeros: missing",
        "model.layers.1.self_attn.o_proj.scales: missing",
        "model.layers.1.mlp.up_proj.qweight: dtype float32, integers expected",
        "model.layers.1.mlp.down_proj.scales: shape [2, 128], [4, 128] expected",
        "model.layers.1.mlp.up_proj.g_idx: unexpected",
    ]


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_scales_that_are_no_numbers(scale: float, tmp_path: Path) -> None:
    stored = checkpoint(AWQ)
    stored.tensors["model.layers.1.self_attn.o_proj.scales"] = np.full((2, 128), scale, np.float16)
    message = r"model\.layers\.1\.self_attn\.o_proj: scales must be finite in float16; download the file again"
    with pytest.raises(CheckpointError, match=message):
        stored.load(tmp_path)


@pytest.mark.parametrize("group", [7, 2**30])
def test_groups_that_are_none(tmp_path: Path, group: int) -> None:
    stored = checkpoint(SCATTERED)
    stored.tensors["model.layers.0.self_attn.o_proj.g_idx"][3] = group
    with pytest.raises(CheckpointError, match="g_idx must give 64 of 128 inputs to each of 2 groups"):
        stored.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, r"quant_method=fp8 is not supported; .* awq, gptq, gptq_v2, compressed-tensors, sm"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method=bitsandbytes is not supported"),
        (awq_config(64, version="gemv"), r"version=gemv of AWQ is not supported, only gemm"),
        (gptq_config(64, bits=8), r"bits=8 is not supported in a GPTQ checkpoint, only 3 and 4"),
        (awq_config(48), r"group_size=48 must be -1 or divide the 128 inputs"),
    ],
)
def test_what_cannot_be_read(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    stored = checkpoint(AWQ)
    stored.hf["quantization_config"] = config
    with pytest.raises(UnsupportedModelError, match=message):
        stored.load(tmp_path)


def test_the_format_that_the_user_names(tmp_path: Path) -> None:
    """Where ``config.json`` says nothing, with the usual groups of 128; or where it says what is not so."""
    silent = checkpoint(Layout(awq_config(128), store_awq, group=128))
    del silent.hf["quantization_config"]
    decoder = silent.load(tmp_path, model_format="awq")
    assert kinds(decoder) == [["int4"] * 4] * 2
    assert apart(logits(decoder), logits(silent.floats())) < SUMMED_APART
    v2 = checkpoint(replace(GPTQ, store=functools.partial(store_gptq, minus=0)))
    assert apart(logits(v2.load(tmp_path, model_format="gptq_v2")), logits(v2.floats())) < SUMMED_APART
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: missing"):
        silent.load(tmp_path)


@pytest.mark.parametrize("name", ["awq", "smooth_quant"])
def test_random_weights_of_a_quantised_model(tmp_path: Path, name: str) -> None:
    """``load_format`` dummy: as many bytes in the same kernels, for measuring speed."""
    hf = {**LLAMA, "quantization_config": {"quant_method": name, "bits": 4, "group_size": 32}}
    decoder = load_model(tmp_path, hf, make_mesh(1), LoadOptions(jnp.dtype(jnp.float32), load_format="dummy"))
    weight = decoder.layers[0].mlp.down
    assert isinstance(weight, Int4Weight if name == "awq" else Int8Weight)
    product = weight.multiply(jnp.eye(hf["intermediate_size"], dtype=jnp.float32))
    assert 0.01 < float(product.std()) < 0.03


@pytest.mark.parametrize(
    ("file", "text", "method"),
    [("quantize_config.json", {"bits": 4, "sym": True}, "gptq"), ("quant_config.json", {"w_bit": 4}, "awq")],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_settings_in_a_file_of_their_own(tmp_path: Path, file: str, text: dict[str, Any], method: str) -> None:
    put_json(tmp_path / "config.json", {"architectures": []})
    put_json(tmp_path / file, text)
    assert read_hf_config(tmp_path)["quantization_config"] == {"quant_method": method, **text}
