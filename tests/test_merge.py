"""Merging a LoRA adapter: each weight is the base's plus the product, in files like the base's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxdeploy.checkpoint.marker import NAME
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.cli import main
from jaxdeploy.compress.merge import merge_lora
from jaxdeploy.compress.work_dir import WorkDir
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.models.registry import family_of, read_config
from tests.stored_models import hf_of
from tests.tiny_adapters import QKV, TinyAdapter

HF = hf_of(
    "LlamaForCausalLM",
    hidden_size=32,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    intermediate_size=64,
)
TIED = {**HF, "tie_word_embeddings": True}
Array = np.ndarray[Any, Any]


def write_base(folder: Path, hf: Mapping[str, Any] = HF, *, files: int = 1, dtype: Any = np.float32) -> Path:
    """A random checkpoint in so many files, and a tokenizer's file beside them."""
    random, table = np.random.default_rng(0), family_of(hf).weights(read_config(hf))
    shapes = {name: shape for source in table.values() for name, shape in zip(source.names, source.shapes, strict=True)}
    tensors = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    folder.mkdir()
    put_json(folder / "config.json", hf)
    put_json(folder / "tokenizer.json", {})
    parts = [dict(list(tensors.items())[part::files]) for part in range(files)]
    names = [f"model-{part + 1:05d}-of-{files:05d}.safetensors" for part in range(files)]
    places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    put_json(folder / "model.safetensors.index.json", {"weight_map": places})
    for file, part in zip(names, parts, strict=True):
        put_tensors(folder / file, part)
    return folder


def read(folder: Path) -> dict[str, Array]:
    return {name: np.array(ref.read()) for name, ref in open_checkpoint(folder).items()}


@pytest.mark.parametrize("files", [1, 3])
def test_weights_are_those_of_the_base_plus_the_products(files: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", files=files)
    made = TinyAdapter(targets=(*QKV, "down_proj", "lm_head"), ranks={"v_proj": 2}, rslora=True)
    merged = merge_lora(base, made.write(tmp_path / "adapter"), tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        module = name.removesuffix(".weight")
        delta = made.delta(module) if module in made.modules() else 0
        np.testing.assert_allclose(after[name], value + delta, rtol=0, atol=2e-6)
    assert set(merged.modules) == set(made.modules())
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {NAME, *(file.name for file in base.iterdir())}
    assert read_hf_config(tmp_path / "out") == read_hf_config(base)
    assert merged.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


def test_the_dtype_of_the_base_is_kept(tmp_path: Path) -> None:
    base, made = write_base(tmp_path / "base", dtype=ml_dtypes.bfloat16), TinyAdapter()
    merge_lora(base, made.write(tmp_path / "adapter"), tmp_path / "out")
    after, name = read(tmp_path / "out"), "model.layers.1.mlp.up_proj"
    exact = read(base)[f"{name}.weight"].astype(np.float32) + made.delta(name).astype(np.float32)
    assert after[f"{name}.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(after[f"{name}.weight"].astype(np.float32), exact, rtol=2**-8, atol=0)


def test_a_tied_head_that_is_adapted_gets_its_own_tensor(tmp_path: Path) -> None:
    base, made = write_base(tmp_path / "base", TIED), TinyAdapter(targets=("lm_head",))
    merge_lora(base, made.write(tmp_path / "adapter"), tmp_path / "out")
    before, after = read(base)["model.embed_tokens.weight"], read(tmp_path / "out")
    np.testing.assert_array_equal(after["model.embed_tokens.weight"], before)
    np.testing.assert_allclose(after["lm_head.weight"], before + made.delta("lm_head"), rtol=0, atol=2e-6)
    assert read_hf_config(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_base(tmp_path / "base", files=3), TinyAdapter().write(tmp_path / "adapter")
    merge_lora(base, adapter, tmp_path / "whole")
    written = WorkDir.write_layer

    def dies(self: Any, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        written(self, index, *args)

    monkeypatch.setattr(WorkDir, "write_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (first,) = (tmp_path / "out.partial").glob("model*.safetensors")
    stamp = first.stat().st_ino
    monkeypatch.undo()
    merge_lora(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / first.name).stat().st_ino == stamp
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "out")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), TinyAdapter().write(tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    put_json(base / "config.json", {**config, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ConfigError, match=r"is quantised \(awq\); merge into the float model"):
        merge_lora(base, adapter, tmp_path / "out")
    put_json(base / "config.json", config)
    with pytest.raises(CheckpointError, match=r"adapter=.* does not fit the model"):
        merge_lora(base, tmp_path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_base(tmp_path / "base"), TinyAdapter().write(tmp_path / "adapter")
    argv = ["lite", "merge_lora", str(base), str(adapter), "--work-dir", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "14 modules merged" in capsys.readouterr().out
    assert main(argv) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert main([*argv[:3]]) == 2
    assert "merge_lora needs an adapter" in capsys.readouterr().err
    assert main([*argv, "--w-bits", "4"]) == 2
    assert "w_bits=4 means nothing to merge_lora" in capsys.readouterr().err
    assert main(["lite", "rtn", str(base), str(adapter)]) == 2
    assert "rtn takes no adapter" in capsys.readouterr().err
