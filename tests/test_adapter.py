"""Reading LoRA adapters: what fits becomes pairs whose product is the module's own, what does not is refused whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxdeploy.checkpoint.adapter import read_adapter
from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files import patterns
from tests.tiny_adapters import ALL, LINEARS, QKV, TinyAdapter
from tests.torch_zip import write_torch_file

CASES = {
    "all": TinyAdapter(),
    "queries": TinyAdapter(targets=("q_proj",), rank=3),
    "queries and values": TinyAdapter(targets=("q_proj", "v_proj"), ranks={"v_proj": 2}),
    "mixed ranks": TinyAdapter(ranks={"k_proj": 1, "down_proj": 7}, alphas={"up_proj": 3.5}),
    "rslora": TinyAdapter(rslora=True, rank=9),
    "second layer": TinyAdapter(layers=(1,), targets=(*QKV, "up_proj")),
    "head": TinyAdapter(targets=("lm_head", "o_proj")),
    "bfloat16": TinyAdapter(dtype=ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_multiply_to_what_their_modules_do(name: str, tmp_path: Path) -> None:
    made = CASES[name]
    adapter = read_adapter(made.write(tmp_path), LINEARS)
    adapted = 0
    for linear in LINEARS.values():
        pair = adapter.pair(linear)
        if pair is None:
            assert not any(made.delta(module).any() for module in linear.modules)
            continue
        adapted += 1
        b = linear.outputs.cut(np.moveaxis(pair.b, 0, -1))
        a = np.split(pair.a.T, len(b))
        for module, up, down in zip(linear.modules, b, a, strict=True):
            np.testing.assert_allclose(up @ down, made.delta(module), rtol=0, atol=1e-6)
    assert adapted == len({path for path, linear in LINEARS.items() if set(linear.modules) & set(made.modules())})


def test_the_rank_of_a_pair_is_the_largest_of_its_modules(tmp_path: Path) -> None:
    adapter = read_adapter(CASES["queries and values"].write(tmp_path), LINEARS)
    pair = adapter.pair(LINEARS["layers", 0, "attention", "wqkv"])
    assert pair is not None
    assert (pair.rank, adapter.rank, pair.a.shape) == (4, 4, (32, 3 * 4))
    assert {pair.a.dtype, pair.b.dtype} == {np.dtype(np.float32)}


def test_pickled_adapters_are_read(tmp_path: Path) -> None:
    made = CASES["all"]
    folder = made.write(tmp_path / "one")
    (folder / "adapter_model.safetensors").unlink()
    write_torch_file(folder / "adapter_model.bin", made.tensors())
    pickled, other = read_adapter(folder, LINEARS), read_adapter(made.write(tmp_path / "two"), LINEARS)
    assert pickled.modules.keys() == other.modules.keys()
    assert all(np.array_equal(pickled.modules[name].b, other.modules[name].b) for name in other.modules)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' must be LORA"),
        ({"use_dora": True}, "use_dora=True: DoRA scales whole weights"),
        ({"bias": "all"}, "bias='all' must be none"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: whole modules"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True: linear maps here are stored"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"r": 0}, "r=0 must be a whole number above 0"),
        ({"r": "4"}, "r='4' must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a number"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern holds what is not a regular expression"),
        ({"rank_pattern": {"(?:.|..|...)*(?<=[!?])": 3}}, "rank_pattern takes more than 0.05 s to match"),
        ({"alpha_pattern": {"(?:.|..|...)*(?<=[!?])": 3}}, "alpha_pattern takes more than 0.05 s to match"),
        ({"rank_pattern": [1]}, "rank_pattern must give"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must give"),
        ({"r": 5}, "q_proj: lora_A has shape [4, 32], [5, 32] expected"),
        ({"rank_pattern": {"layers.1.mlp.up_proj": 2}}, "layers.1.mlp.up_proj: lora_B has shape [64, 4], [64, 2]"),
    ],
)
def test_configurations_that_cannot_be_served(
    config: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    assert message in _refusal(TinyAdapter().write(tmp_path, config=config))


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    first = "base_model.model.model.layers.0.self_attn."
    folder = TinyAdapter(targets=QKV).write(tmp_path)
    tensors = TinyAdapter(targets=QKV).tensors()
    del tensors[first + "q_proj.lora_B.weight"]
    tensors[first + "k_proj.lora_B.weight"] = np.zeros((7, 4), np.float32)
    tensors[first + "v_proj.lora_A.weight"] = np.zeros((4, 32), np.int32)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 96), np.float32)
    put_tensors(folder / "adapter_model.safetensors", tensors)
    assert _refusal(folder).splitlines() == [
        f"adapter={folder} does not fit the model; mend it, or give another:",
        f"  {first}v_proj.lora_A.weight: dtype int32, floating point expected",
        "  base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight: unexpected; "
        "the model has no such linear map",
        "  base_model.model.model.embed_tokens.lora_embedding_A: unexpected; the model has no such linear map",
        "  model.layers.0.self_attn.q_proj: lora_B is missing",
        "  model.layers.0.self_attn.k_proj: lora_B has shape [7, 4], [32, 4] expected",
    ]


def test_a_long_list_is_whole(tmp_path: Path) -> None:
    wide = TinyAdapter(targets=ALL).write(tmp_path, config={"r": 3})
    assert len(_refusal(wide).splitlines()) > 25


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json: missing" in _refusal(tmp_path / "empty")
    assert "adapter_model.safetensors or adapter_model.bin: missing" in _refusal(tmp_path / "empty")
    for path, rule in ((tmp_path / "nowhere", "does not exist"), (Path(__file__), "is a file")):
        assert _refusal(path) == f"adapter={path} {rule}; give the folder that PEFT saved the adapter to"
    folder = TinyAdapter().write(tmp_path)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json: is not JSON" in _refusal(folder)
    put_json(folder / "adapter_config.json", [])
    assert "is not a JSON object" in _refusal(folder)
    whole = TinyAdapter().write(tmp_path / "cut") / "adapter_model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-8])
    assert "adapter_model.safetensors: truncated" in _refusal(whole.parent)
    put_tensors(whole, {})
    assert "holds no tensors" in _refusal(whole.parent)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    folder, tensors = TinyAdapter(targets=("o_proj",)).write(tmp_path), TinyAdapter(targets=("o_proj",)).tensors()
    next(iter(tensors.values()))[0, 0] = np.inf
    put_tensors(folder / "adapter_model.safetensors", tensors)
    assert "model.layers.0.self_attn.o_proj: holds values that are not finite" in _refusal(folder)


def test_ranks_have_a_limit(tmp_path: Path) -> None:
    folder = TinyAdapter(targets=("o_proj",), layers=(0,)).write(tmp_path)
    with pytest.raises(CheckpointError, match="o_proj: rank 4 is more than max_lora_rank=3; raise that"):
        read_adapter(folder, LINEARS, max_rank=3)
    assert read_adapter(folder, LINEARS, max_rank=4).rank == 4


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder, LINEARS)
    return str(caught.value)


def test_copies_of_the_base_are_ignored_where_they_are_equal(tmp_path: Path) -> None:
    made = TinyAdapter(targets=("q_proj", "lm_head"))
    head = np.random.default_rng(1).standard_normal((96, 32)).astype(np.float32)
    put_tensors(tmp_path / "base.safetensors", {"lm_head.weight": head})
    base = read_safetensors_file(tmp_path / "base.safetensors")
    names = ("lm_head.base_layer.weight", "lm_head.modules_to_save.weight", "lm_head.weight")
    for index, name in enumerate(names):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            folder = made.write(tmp_path / f"{index} {np.dtype(dtype)}", config={"modules_to_save": ["lm_head"]})
            saved = {**made.tensors(), f"base_model.model.{name}": head.astype(dtype)}
            put_tensors(folder / "adapter_model.safetensors", saved)
            assert read_adapter(folder, LINEARS, base=base).modules.keys() == made.modules().keys()
    saved[f"base_model.model.{name}"][5, 7] += 1
    put_tensors(folder / "adapter_model.safetensors", saved)
    with pytest.raises(CheckpointError, match=r"model\.lm_head\.weight: differs from the model's; an adapter cannot"):
        read_adapter(folder, LINEARS, base=base)
    assert "lm_head.weight: unexpected; the model has no tensor lm_head.weight to compare it with" in _refusal(folder)
