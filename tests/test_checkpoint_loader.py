from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxdeploy.checkpoint import finite
from jaxdeploy.checkpoint.loader import AbstractParams, dummy_params, load_params
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import abstract_params, decoder_from
from jaxdeploy.models.dense import DenseDecoder
from jaxdeploy.models.families import llama
from jaxdeploy.models.registry import family_of, read_config
from jaxdeploy.models.rope import RopeConfig
from jaxdeploy.models.weights import WeightTable
from tests.torch_zip import write_torch_file

Tensors = dict[str, np.ndarray[Any, Any]]
TITLE = "the checkpoint's files do not fit its config.json; download them again or mend config.json:"


def config(**sizes: Any) -> ModelConfig:
    plain = {
        "vocab_size": 24,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "intermediate_size": 40,
    }
    options: dict[str, Any] = {"norm_eps": 1e-5, "max_position": 64, "rope": RopeConfig(), **plain, **sizes}
    return DenseDecoder(windows=(None,) * options["num_layers"], **options).model_config()


def model(**sizes: Any) -> tuple[AbstractParams, WeightTable]:
    chosen = config(**sizes)
    return abstract_params(chosen, jnp.dtype(jnp.float32)), llama.weights(chosen)


def tensors_of(table: WeightTable, dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {n: shape for source in table.values() for n, shape in zip(source.names, source.shapes, strict=True)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_shards(folder: Path, tensors: Tensors, count: int) -> list[str]:
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    names = list(tensors)
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::count]}, folder / file)
    places = {name: files[number % count] for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return files


@pytest.mark.parametrize("form", ["safetensors", "shards", "torch"])
def test_every_form_gives_the_same_parameters(tmp_path: Path, form: str) -> None:
    params, table = model()
    tensors = tensors_of(table)
    if form == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    elif form == "shards":
        write_shards(tmp_path, tensors, 3)
    else:
        write_torch_file(tmp_path / "pytorch_model.bin", tensors)
    loaded = load_params(params, table, open_checkpoint(tmp_path))
    assert loaded.keys() == params.keys()
    for path, source in table.items():
        np.testing.assert_array_equal(loaded[path], source.assemble([tensors[name] for name in source.names]))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path: Path, stored: Any, wanted: Any) -> None:
    params, table = model()
    tensors = tensors_of(table, stored)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_params(params, table, open_checkpoint(tmp_path), dtype=wanted)
    assert {value.dtype for value in loaded.values()} == {np.dtype(wanted)}
    expected = tensors["model.embed_tokens.weight"].astype(wanted)
    np.testing.assert_array_equal(loaded["embedding", "table"], expected)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_values_beyond_float16(tmp_path: Path, stored: Any) -> None:
    params, table = model()
    tensors = tensors_of(table, stored)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_params(params, table, open_checkpoint(tmp_path), dtype=jnp.float16)
    assert str(caught.value) == "dtype=float16 cannot hold the values of norm.scale; use dtype=bfloat16"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite(tmp_path: Path, dtype: Any) -> None:
    params, table = model()
    name = "model.layers.1.self_attn.k_proj.weight"
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        tensors = tensors_of(table, dtype)
        tensors[name][-1, -1] = value
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load_params(params, table, open_checkpoint(tmp_path), dtype=dtype)
        assert str(caught.value) == f"{name}: holds values that are not finite; download the weights again"


def test_large_arrays_are_searched_to_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_PER_THREAD", 1000)
    monkeypatch.setattr(finite, "_PIECE", 64)
    array = np.full((7, 501), -np.finfo(np.float16).max, np.float16)
    assert finite.is_finite(array)
    for place in (0, 63, 64, 1000, array.size - 1):
        array.reshape(-1)[place] = np.nan
        assert not finite.is_finite(array)
        array.reshape(-1)[place] = 0


def test_parameters_outlive_their_files(tmp_path: Path) -> None:
    params, table = model()
    tensors = tensors_of(table)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_params(params, table, open_checkpoint(tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as handle:
        handle.truncate(0)
    np.testing.assert_array_equal(loaded["norm", "scale"], tensors["model.norm.weight"])
    np.testing.assert_array_equal(loaded["embedding", "table"], tensors["model.embed_tokens.weight"])


def test_parameters_go_straight_to_their_sharding(tmp_path: Path) -> None:
    params, table = model()
    tensors = tensors_of(table)
    save_file(tensors, tmp_path / "model.safetensors")
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))

    def sharding_of(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        spec = ("tp" if axis in ("kv_heads", "mlp") else None for axis in axes)
        return NamedSharding(mesh, PartitionSpec(*spec))

    loaded = load_params(params, table, open_checkpoint(tmp_path), sharding_of=sharding_of)
    gate_up = loaded["layers", 0, "mlp", "gate_up"]
    assert [shard.data.shape for shard in gate_up.addressable_shards] == [(16, 2, 20)] * 2
    source = table["layers", 0, "mlp", "gate_up"]
    np.testing.assert_array_equal(gate_up, source.assemble([tensors[name] for name in source.names]))
    dummy = dummy_params(params, sharding_of=sharding_of)
    assert dummy["layers", 0, "mlp", "gate_up"].sharding == gate_up.sharding
    np.testing.assert_array_equal(dummy["head", "weight"], dummy_params(params)["head", "weight"])


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    params, table = model()
    tensors = tensors_of(table)
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:20]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((40, 16), np.int32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_params(params, table, open_checkpoint(tmp_path))
    assert str(caught.value).split("\n") == [
        TITLE,
        "  model.norm.weight: missing",
        "  model.layers.1.self_attn.k_proj.weight: missing",
        "  lm_head.weight: shape [20, 16], [24, 16] expected",
        "  model.layers.0.mlp.up_proj.weight: dtype int32, floating point expected",
        "  model.layers.0.self_attn.q_norm.weight: unexpected",
    ]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    params, table = model()
    tensors = tensors_of(table) | {f"odd.{number:02d}": np.ones(1, np.float32) for number in range(33)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_params(params, table, open_checkpoint(tmp_path))
    lines = str(caught.value).split("\n")
    assert len(lines) == 22
    assert lines[-2:] == ["  odd.19: unexpected", "  ... and 13 more"]


def test_faults_of_files_come_with_those_of_tensors(tmp_path: Path) -> None:
    params, table = model()
    tensors = tensors_of(table)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    files = write_shards(tmp_path, tensors, 3)
    (tmp_path / files[1]).unlink()
    size = (tmp_path / files[0]).stat().st_size
    with (tmp_path / files[0]).open("r+b") as handle:
        handle.truncate(size - 4)
    with pytest.raises(CheckpointError) as caught:
        load_params(params, table, open_checkpoint(tmp_path))
    assert str(caught.value).split("\n") == [
        TITLE,
        f"  {files[0]}: truncated: {size - 4} bytes, {size} expected; download it again",
        f"  {files[1]}: missing; download it again",
        "  lm_head.weight: shape [16, 24], [24, 16] expected",
    ]


def test_one_truncated_file_is_one_fault(tmp_path: Path) -> None:
    params, table = model()
    write_torch_file(tmp_path / "pytorch_model.bin", tensors_of(table))
    with (tmp_path / "pytorch_model.bin").open("r+b") as handle:
        handle.truncate(3000)
    with pytest.raises(CheckpointError) as caught:
        load_params(params, table, open_checkpoint(tmp_path))
    fault = "pytorch_model.bin: truncated: 3000 bytes, the zip directory at its end is missing; download it again"
    assert str(caught.value).split("\n") == [TITLE, f"  {fault}"]


def test_stored_head_of_a_tied_model_is_ignored(tmp_path: Path) -> None:
    params, table = model(tie_embeddings=True)
    extra = {"lm_head.weight": np.zeros((24, 16), np.float32)}
    save_file(tensors_of(table) | extra, tmp_path / "model.safetensors")
    assert ("head", "weight") not in load_params(params, table, open_checkpoint(tmp_path))


def test_progress_is_on_stderr_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params, table = model()
    save_file(tensors_of(table), tmp_path / "model.safetensors")
    load_params(params, table, open_checkpoint(tmp_path))
    assert capsys.readouterr() == ("", "")
    load_params(params, table, open_checkpoint(tmp_path), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading weights: 100%" in err


def test_dummy_parameters() -> None:
    params, _ = model()
    drawn = dummy_params(params, dtype=jnp.bfloat16)
    assert drawn.keys() == params.keys()
    assert {value.dtype for value in drawn.values()} == {np.dtype(jnp.bfloat16)}
    assert {path: value.shape for path, value in drawn.items()} == {p: v.get_value().shape for p, v in params.items()}
    np.testing.assert_array_equal(drawn["layers", 1, "mlp_norm", "scale"], np.ones(16))
    first, second = (np.asarray(drawn["layers", i, "mlp", "gate_up"], np.float32) for i in (0, 1))
    assert 0.018 < first.std() < 0.022
    assert abs(first.mean()) < 0.002
    assert not np.array_equal(first, second)
    again, other = dummy_params(params, dtype=jnp.bfloat16), dummy_params(params, seed=1, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(again["head", "weight"], drawn["head", "weight"])
    assert not np.array_equal(other["head", "weight"], drawn["head", "weight"])


def test_a_trained_model_continues_its_own_text(shared: Path) -> None:
    folder = shared / "assets/models/stories260K"
    hf = read_hf_config(folder)
    chosen = read_config(hf)
    params = load_params(
        abstract_params(chosen, jnp.dtype(jnp.float32)), family_of(hf).weights(chosen), open_checkpoint(folder)
    )
    tokens = jnp.array([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298]], jnp.int32)
    logits = decoder_from(chosen, params)(tokens)
    assert logits.argmax(-1)[0, :-1].tolist() == tokens[0, 1:].tolist()


LARGE = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "head_dim": 64}
LARGE |= {"num_kv_heads": 4, "num_layers": 5}


def large_checkpoint(folder: Path) -> tuple[int, int, int]:
    """About 90 MB in four shards; gives bytes of the checkpoint, of its largest shard and largest parameter."""
    params, table = model(**LARGE)
    tensors = {name: np.broadcast_to(np.float32(0.5), value) for name, value in shapes_of(table).items()}
    files = write_shards(folder, {name: np.ascontiguousarray(value) for name, value in tensors.items()}, 4)
    sizes = [(folder / file).stat().st_size for file in files]
    return sum(sizes), max(sizes), max(value.get_value().size * 4 for value in params.values())


def shapes_of(table: WeightTable) -> dict[str, tuple[int, ...]]:
    return {n: shape for source in table.values() for n, shape in zip(source.names, source.shapes, strict=True)}


TRACE = """
import sys, tracemalloc
from pathlib import Path
import jax.numpy as jnp
from tests.test_checkpoint_loader import LARGE, model
from jaxdeploy.checkpoint.loader import load_params
from jaxdeploy.checkpoint.tensors import open_checkpoint

params, table = model(**LARGE)
files = open_checkpoint(Path(sys.argv[1]))
tracemalloc.start()
load_params(params, table, files, dtype=jnp.bfloat16)
_, peak = tracemalloc.get_traced_memory()
print(peak - files.nbytes // 2)  # a CPU device may keep the array that it was given
"""


def test_host_arrays_stay_below_one_shard_and_one_parameter(tmp_path: Path) -> None:
    """What numpy and Python hold on top of the parameters: sources are mapped, so only the parameter in work.

    The process is a fresh one: a thread that another test left would be counted too.
    """
    _, shard, largest = large_checkpoint(tmp_path)
    command = [sys.executable, "-c", TRACE, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < shard + largest


MEASURE = """
import re, sys
from pathlib import Path
from tests.test_checkpoint_loader import LARGE, model
from jaxdeploy.checkpoint.loader import load_params
from jaxdeploy.checkpoint.tensors import open_checkpoint

def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_params(*model(), open_checkpoint(Path(sys.argv[2])))  # what code takes up, once and for all
params, table = model(**LARGE)
before = kib("VmRSS")
loaded = load_params(params, table, open_checkpoint(Path(sys.argv[1])))
print((kib("VmHWM") - before) * 1024)
"""


def test_peak_memory_is_below_checkpoint_and_one_shard(tmp_path: Path) -> None:
    """Resident memory of a fresh process, device buffers and mapped pages included."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    write_shards(small, tensors_of(model()[1]), 1)
    whole, shard, _ = large_checkpoint(large)
    command = [sys.executable, "-c", MEASURE, str(large), str(small)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert whole * 0.9 < int(done.stdout) < whole + shard, done.stdout
