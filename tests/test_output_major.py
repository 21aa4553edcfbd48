"""Float weights with their outputs first: the same model, multiplied the way a CPU likes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.checkpoint.export import save_checkpoint
from jaxdeploy.checkpoint.loader import dummy_params
from jaxdeploy.checkpoint.model import LoadOptions, load_model
from jaxdeploy.models.decoder import Decoder, abstract_params
from jaxdeploy.models.output_major import OutputMajorWeight, product
from jaxdeploy.models.registry import FAMILIES, family_of
from jaxdeploy.models.weights import output_major
from jaxdeploy.parallel.mesh import make_mesh
from tests.stored_models import SUMMED_APART, apart, logits, weights_of

HF: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
FLOAT32 = jnp.dtype(jnp.float32)


def hf_of(architecture: str, **fields: Any) -> dict[str, Any]:
    return {**HF, "architectures": [architecture], **fields}


def stored(folder: Path, hf: dict[str, Any]) -> Path:
    config = family_of(hf).model_config(hf)
    save_checkpoint(folder, dummy_params(abstract_params(config, FLOAT32)), family_of(hf).weights(config), hf)
    return folder


def load(folder: Path, hf: dict[str, Any], *, outputs_first: bool, tp: int = 1) -> Decoder:
    return load_model(folder, hf, make_mesh(tp), LoadOptions(FLOAT32, outputs_first=outputs_first))


@pytest.mark.parametrize("tokens", [1, 2, 32, 33])
@pytest.mark.parametrize("outputs", [(24,), (2, 3, 4)])
def test_the_product(tokens: int, outputs: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x, rows = random.standard_normal((tokens, 16), np.float32), random.standard_normal((*outputs, 16), np.float32)
    got = jax.jit(product)(x, rows)
    np.testing.assert_allclose(got, np.einsum("tk,...k->t...", x, rows), rtol=0, atol=2e-5)
    assert jax.eval_shape(lambda: product(jnp.bfloat16(x), jnp.bfloat16(rows), jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize(("tokens", "left"), [(1, False), (2, True), (32, True), (33, False)])
def test_few_tokens_come_on_the_right(tokens: int, left: bool) -> None:
    """XLA turns products round as it likes: this holds the barrier that keeps it from doing so."""
    args = (jax.ShapeDtypeStruct((tokens, 64), FLOAT32), jax.ShapeDtypeStruct((96, 64), FLOAT32))
    program = str(jax.jit(product).lower(*args).compile().as_text())
    dots = re.findall(r"= f32\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", program)
    assert (("96", str(tokens)) in dots) == left


@pytest.mark.parametrize(("architecture", "tied"), [*((name, False) for name in FAMILIES), ("LlamaForCausalLM", True)])
def test_the_same_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    hf = hf_of(architecture, tie_word_embeddings=tied)
    folder = stored(tmp_path, hf)
    ours, plain = (load(folder, hf, outputs_first=first) for first in (True, False))
    assert all(isinstance(weight, OutputMajorWeight) for index in range(2) for weight in weights_of(ours, index))
    assert apart(logits(ours), logits(plain)) < SUMMED_APART


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_on_several_devices(tmp_path: Path, tp: int) -> None:
    hf = hf_of("LlamaForCausalLM")
    folder = stored(tmp_path, hf)
    cut = load(folder, hf, outputs_first=True, tp=tp)
    assert apart(logits(cut), logits(load(folder, hf, outputs_first=False))) < SUMMED_APART
    for weight, axis in zip(weights_of(cut), (0, 1, 1, 1), strict=True):
        rows = weight.rows[...]
        share = [size // tp if index == axis else size for index, size in enumerate(rows.shape)]
        assert [list(shard.data.shape) for shard in rows.addressable_shards] == [share] * tp


@pytest.mark.parametrize("architecture", FAMILIES)
def test_there_and_back(architecture: str) -> None:
    """What is read with outputs first can be written as it was stored."""
    hf, random = hf_of(architecture), np.random.default_rng(0)
    for path, source in family_of(hf).weights(family_of(hf).model_config(hf)).items():
        if source.linear is None:
            continue
        arrays = [random.standard_normal(shape, np.float32) for shape in source.shapes]
        turned = output_major(source)
        rows = turned.assemble(arrays)
        assert rows.shape[-1] == source.linear.width
        for back, array in zip(turned.split(rows), arrays, strict=True):
            np.testing.assert_array_equal(back, array, err_msg=str(path))
