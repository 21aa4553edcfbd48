"""More tensor-parallel devices than KV heads: each KV head is repeated, and each device gets whole groups."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import GOLDENS

from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import tensor_parallel
from tests.parity.measure import greedy_reply, read_expected
from tests.stored_models import AWQ, SHARED, SMOOTH_QUANT, SUMMED_APART, Layout, apart, checkpoint, hf_of, kinds, logits
from tests.tiny_adapters import TinyAdapter
from tests.tiny_models import request, run

DEMO = Path(bundled_model())
TWO_KV = {**SHARED, "num_key_value_heads": 2}
"""As ``SHARED``, whose programs four devices run, with half the KV heads."""


def config_of(architecture: str = "LlamaForCausalLM", **sizes: Any) -> ModelConfig:
    hf = hf_of(architecture, num_hidden_layers=1, **sizes)
    return family_of(hf).model_config(hf)


def kv_heads_of(config: ModelConfig) -> int:
    """The KV heads of the cache of every layer."""
    (layout,) = set(cache_layouts(config))
    assert isinstance(layout, HeadsLayout)
    return layout.num_heads


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(4, 2, 4), (8, 2, 8), (8, 1, 2), (12, 6, 4), (4, 2, 2)])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM"])
def test_keys_and_values_are_repeated_as_stored(architecture: str, heads: int, kv_heads: int, tp: int) -> None:
    """Query head n reads the key and value of its own group, whatever the number of copies."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 2, "hidden_size": 3}
    stored = config_of(architecture, **sizes)
    shared = tensor_parallel(stored, tp)
    assert kv_heads_of(shared) == np.lcm(kv_heads, tp)
    copies = kv_heads_of(shared) // kv_heads
    path = ("layers", 0, "attention", "wqkv")
    plain, repeated = (
        family_of({"architectures": [architecture]}).weights(config)[path] for config in (stored, shared)
    )
    assert (plain.names, plain.shapes) == (repeated.names, repeated.shapes)
    random = np.random.default_rng(0)
    tensors = [random.standard_normal(shape) for shape in plain.shapes]
    expected, found = plain.assemble(tensors), repeated.assemble(tensors)
    np.testing.assert_array_equal(found[:, :, :-2].reshape(3, heads, 2), expected[:, :, :-2].reshape(3, heads, 2))
    np.testing.assert_array_equal(found[:, :, -2:], np.repeat(expected[:, :, -2:], copies, axis=1))
    for array, tensor in zip(repeated.split(found), tensors, strict=True):
        np.testing.assert_array_equal(array, tensor)
    assert repeated.linear is not None
    low_rank = [random.standard_normal((shape[0], 5)) for shape in plain.shapes]
    b = np.moveaxis(repeated.linear.outputs.join(low_rank), -1, 0)
    np.testing.assert_array_equal(b[:, ::copies, -2:], b[:, copies - 1 :: copies, -2:])
    assert b.shape == (5, *found.shape[1:])


def test_calibrated_ranges_are_repeated() -> None:
    parameters = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    expected = HeadsLayout(2, 8, 8).ranges(parameters).repeat(3, axis=1)
    np.testing.assert_array_equal(HeadsLayout(6, 8, 8, copies=3).ranges(parameters), expected)


@pytest.mark.parametrize(("layout", "devices"), [(AWQ, 4), pytest.param(SMOOTH_QUANT, 1, marks=pytest.mark.slow)])
def test_quantised_weights_stay_quantised(layout: Layout, devices: int, tmp_path: Path) -> None:
    """Four devices would round activations of SmoothQuant in smaller steps, so one device holds the repeated heads."""
    stored = checkpoint(layout, TWO_KV)
    model = tensor_parallel(family_of(stored.hf).model_config(stored.hf), 4)
    decoder, one = stored.load(tmp_path, tp=devices, model=model), stored.load(tmp_path)
    assert kinds(decoder) == kinds(one)
    assert kv_heads_of(decoder.config) == 4
    assert apart(logits(decoder), logits(one)) < SUMMED_APART


def replies(folder: Path, adapter: str | None = None, **options: Any) -> dict[str, list[int]]:
    """Greedy replies to prompts that are computed in one chunk or several."""
    sizes = {"warmup": False, "block_size": 16, "max_batch_size": 4, "max_prefill_token_num": 64, "session_len": 96}
    engine = build_engine(folder, read_hf_config(folder), EngineConfig(**{**sizes, **options}))
    prompts = (np.random.default_rng(length).integers(0, 64, length).tolist() for length in (3, 70))
    items = [replace(request(str(len(ids)), ids, max_new_tokens=16), adapter=adapter) for ids in prompts]
    found = run(engine, items)
    engine.close()
    return found


def test_four_devices_continue_a_golden_with_two_kv_heads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxdeploy")
    folder, count = GOLDENS / "llama", 16
    expected = read_expected(folder)
    assert greedy_reply(folder, expected["prompt"], count, tp=4) == expected["greedy"][:count].tolist()
    assert [text for text in caplog.messages if "2 KV heads, each on 2 devices" in text]


@pytest.mark.slow
def test_an_adapter_on_four_devices(tmp_path: Path) -> None:
    """The keys and values that an adapter adds are repeated too."""
    folder = GOLDENS / "llama"
    config = family_of(read_hf_config(folder)).model_config(read_hf_config(folder))
    adapter = TinyAdapter(base=config).write(tmp_path / "adapter")
    options: dict[str, Any] = {"adapters": {"a": str(adapter)}}
    one, four = (replies(folder, adapter="a", tp=tp, **options) for tp in (1, 4))
    assert four == one != replies(folder, tp=4, **options)


@pytest.mark.slow
def test_a_draft_model_on_four_devices() -> None:
    """The bundled model has two KV heads; as its own draft model it is always right."""
    assert replies(DEMO, tp=4, speculative_model=str(DEMO)) == replies(DEMO)


@pytest.mark.slow
@pytest.mark.parametrize("quant_policy", [0, 8, 4])
@pytest.mark.parametrize("kind", ["float", "awq"])
def test_several_devices_generate_what_one_does(kind: str, quant_policy: int, tmp_path: Path) -> None:
    stored = checkpoint(AWQ, TWO_KV)
    if kind == "float":
        stored = replace(stored, hf=dict(TWO_KV), tensors=stored.values)
    stored.write(tmp_path)
    one, four = (replies(tmp_path, tp=tp, quant_policy=quant_policy) for tp in (1, 4))
    assert four == one


@pytest.mark.parametrize(
    ("sizes", "tp", "message"),
    [
        (
            {"num_attention_heads": 71, "num_key_value_heads": 1, "intermediate_size": 71 * 4},
            2,
            "tp=2 must divide 71 query heads (71 = 35 x 2 + 1); use tp=1 or 71",
        ),
        (
            {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 14 * 8},
            4,
            "tp=4 must divide 14 query heads (14 = 3 x 4 + 2); use tp=1, 2, 7 or 14",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 172},
            8,
            "tp=8 must divide 172 intermediate features (172 = 21 x 8 + 4); use tp=1, 2 or 4",
        ),
    ],
)
def test_tp_that_does_not_divide_is_refused_before_weights_are_read(
    sizes: dict[str, int], tp: int, message: str, tmp_path: Path
) -> None:
    """The folder has no weights."""
    hf = hf_of("LlamaForCausalLM", num_hidden_layers=1, **sizes)
    with pytest.raises(ConfigError) as caught:
        build_engine(tmp_path, hf, EngineConfig(tp=tp))
    assert str(caught.value) == message
