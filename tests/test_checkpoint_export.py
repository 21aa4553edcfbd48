from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from jaxdeploy.checkpoint.export import check_writable, save_checkpoint
from jaxdeploy.checkpoint.loader import dummy_params, load_params
from jaxdeploy.checkpoint.marker import NAME
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.decoder import abstract_params
from jaxdeploy.models.registry import FAMILIES, family_of, read_config
from jaxdeploy.models.weights import ParamPath, Source, less

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "torch_dtype": "float64",
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_saved_is_loaded_as_it_was(tmp_path: Path, architecture: str) -> None:
    hf = HF | {"architectures": [architecture]}
    config = read_config(hf)
    params, table = abstract_params(config, jnp.dtype(jnp.float32)), family_of(hf).weights(config)
    drawn = dummy_params(params)
    save_checkpoint(tmp_path / "new" / "folder", drawn, table, hf)
    loaded = load_params(params, table, open_checkpoint(tmp_path / "new" / "folder"))
    assert loaded.keys() == drawn.keys()
    for path, value in drawn.items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=str(path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_in_the_chosen_dtype(tmp_path: Path, dtype: Any) -> None:
    config = read_config(HF)
    params = dummy_params(abstract_params(config, jnp.dtype(jnp.float32)))
    save_checkpoint(tmp_path, params, family_of(HF).weights(config), HF, dtype=dtype)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", NAME, "model.safetensors"]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {k: v for k, v in HF.items() if k != "torch_dtype"} | {"dtype": np.dtype(dtype).name}
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("lm_head.weight").get_shape() == [24, 16]
    head = open_checkpoint(tmp_path)["lm_head.weight"]
    np.testing.assert_array_equal(head.read(), np.asarray(params["head", "weight"]).T.astype(dtype))


def test_unwritable_save_path_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "file" / "out", {}, {}, {})
    expected = f"save_path={tmp_path}/file/out cannot be written (Not a directory); use another folder"
    assert str(caught.value) == expected
    with pytest.raises(CheckpointError, match=r"^save_path=.*/file cannot be written \(File exists\); use another"):
        check_writable(tmp_path / "file")


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    config = read_config(HF)
    table = family_of(HF).weights(config)
    params = dummy_params(abstract_params(config, jnp.dtype(jnp.float32)))
    save_checkpoint(tmp_path, params, table, HF)
    before = (tmp_path / "model.safetensors").read_bytes()
    broken = params | {("norm", "scale"): jnp.ones(15)}
    with pytest.raises(AssertionError, match="split into"):
        save_checkpoint(tmp_path, broken, table, HF)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {NAME, "config.json", "model.safetensors"}


def test_an_offset_is_taken_off_before_rounding(tmp_path: Path) -> None:
    """``less`` (Gemma's norms): what is rounded to the stored dtype is the scale less 1."""
    table: dict[ParamPath, Source] = {("norm", "scale"): less(1.0, "norm.weight", 5)}
    scale = np.array([1.0, 1.001, 0.99, -0.3, 2.0], np.float32)
    save_checkpoint(tmp_path, {("norm", "scale"): scale}, table, HF, dtype=ml_dtypes.bfloat16)
    stored = open_checkpoint(tmp_path)["norm.weight"].read()
    np.testing.assert_array_equal(stored, (scale - 1).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(
        table["norm", "scale"].assemble([stored]), table["norm", "scale"].rounded(scale, stored.dtype)
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoint_of_others_is_not_replaced(tmp_path: Path, name: str) -> None:
    config = read_config(HF)
    params = dummy_params(abstract_params(config, jnp.dtype(jnp.float32)))
    (tmp_path / name).write_text("theirs")
    with pytest.raises(CheckpointError, match=f"holds {name}, which jaxdeploy did not write; use another folder"):
        save_checkpoint(tmp_path, params, family_of(HF).weights(config), HF)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "theirs")]


def test_parameters_that_the_table_does_not_know(tmp_path: Path) -> None:
    config = read_config(HF)
    params = dummy_params(abstract_params(config, jnp.dtype(jnp.float32)))
    del params["norm", "scale"]
    with pytest.raises(
        CheckpointError, match=r"^parameters norm\.scale are not both in the model and its weight table"
    ):
        save_checkpoint(tmp_path, params, family_of(HF).weights(config), HF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_transformers_loads_what_was_saved(tmp_path: Path, dtype: Any) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from jaxdeploy.models.decoder import decoder_from

    config = read_config(HF)
    params = dummy_params(abstract_params(config, jnp.dtype(jnp.float32)), dtype=dtype)
    save_checkpoint(tmp_path, params, family_of(HF).weights(config), HF, dtype=dtype)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == {np.float32: torch.float32}.get(dtype, torch.bfloat16)
    tokens = np.arange(10)[None]
    with torch.no_grad():
        expected = theirs.float()(torch.from_numpy(tokens)).logits.numpy()
    wide = {path: value.astype(jnp.float32) for path, value in params.items()}
    ours = decoder_from(config, wide)(jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
