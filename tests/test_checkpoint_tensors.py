from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdeploy.checkpoint.tensors import TensorFiles, open_checkpoint
from jaxdeploy.errors import CheckpointError
from tests.torch_zip import write_torch_file

A, B, C = (np.full(3, value, np.float32) for value in (1, 2, 3))
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index(folder: Path, places: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def values(files: TensorFiles) -> dict[str, float]:
    return {name: float(ref.read()[0]) for name, ref in files.items()}


def test_one_safetensors_file_goes_before_torch_files(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    write_torch_file(tmp_path / "pytorch_model.bin", {"a": C})
    files = open_checkpoint(tmp_path)
    assert values(files) == {"a": 1, "b": 2}
    assert (files.faults, files.nbytes) == ((), 24)


def test_indexed_shards(tmp_path: Path) -> None:
    save_file({"a": A, "b": C}, tmp_path / FIRST)
    save_file({"b": B}, tmp_path / SECOND)
    index(tmp_path, {"a": FIRST, "b": SECOND})
    assert values(open_checkpoint(tmp_path)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("indexed", [True, False])
def test_torch_shards_with_and_without_index(tmp_path: Path, indexed: bool) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    write_torch_file(tmp_path / names[0], {"a": A})
    write_torch_file(tmp_path / names[1], {"b": B})
    if indexed:
        index(tmp_path, {"a": names[0], "b": names[1]}, "pytorch_model.bin.index.json")
    files = open_checkpoint(tmp_path)
    assert (values(files), files.faults) == ({"a": 1, "b": 2}, ())


def test_missing_and_truncated_shards_are_faults(tmp_path: Path) -> None:
    third = "model-00003-of-00003.safetensors"
    save_file({"a": A}, tmp_path / FIRST)
    save_file({"c": C}, tmp_path / third)
    whole = (tmp_path / third).read_bytes()
    (tmp_path / third).write_bytes(whole[:-5])
    index(tmp_path, {"a": FIRST, "b": SECOND, "c": third})
    files = open_checkpoint(tmp_path)
    assert files.faults == (
        f"{SECOND}: missing; download it again",
        f"{third}: truncated: {len(whole) - 5} bytes, {len(whole)} expected; download it again",
    )
    assert (set(files), files.lost) == ({"a"}, frozenset({"b", "c"}))


def test_shards_that_count_themselves(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model-00001-of-00003.safetensors")
    save_file({"c": C}, tmp_path / "model-00003-of-00003.safetensors")
    assert open_checkpoint(tmp_path).faults == ("model-00002-of-00003.safetensors: missing; download it again",)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("[]", "is not a JSON object"),
        ("{}", "is not an index of shards"),
        ("{", r"is not JSON \(.*\)"),
        ('{"weight_map": []}', "is not an index of shards"),
    ],
)
def test_index_that_is_none(tmp_path: Path, content: str, rule: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (fault,) = open_checkpoint(tmp_path).faults
    assert re.fullmatch(rf"model\.safetensors\.index\.json: {rule}; download it again", fault)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_cannot_name_files_elsewhere(tmp_path: Path, shard: str) -> None:
    index(tmp_path, {"a": shard})
    assert open_checkpoint(tmp_path).faults == (
        f"model.safetensors.index.json: names {shard}, which is not beside it; download it again",
    )


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^model=.* has no weights; put model.safetensors, its shards .* in$"):
        open_checkpoint(tmp_path)


GPTQ = "gptq_model-4bit-128g"


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({f"{GPTQ}.safetensors": A, "quantize_config.json": {"bits": 4}}, 1),
        ({f"{GPTQ}.safetensors": A, "quantize_config.json": {"bits": 4}, "pytorch_model.bin": B}, 1),
        ({f"{GPTQ}.bin": A, "quantize_config.json": {"bits": 4}, "pytorch_model.bin": B}, 1),
        ({f"{GPTQ}.safetensors": A, "model.safetensors": B}, 2),
        ({"4bit-128g.safetensors": A, "training_args.bin": B, "adapter_model.safetensors": C}, 1),
        ({"a.safetensors": A, "b.safetensors": B, "quantize_config.json": {"bits": 4, "model_file_base_name": "b"}}, 2),
        ({"a.safetensors": A, "quantize_config.json": {"bits": 4, "model_basename": "missing"}}, 1),
        ({"awq_model_w4_g128.pt": A, "optimizer.pt": B}, 1),
        ({f"{GPTQ}-00001-of-00002.safetensors": A, f"{GPTQ}-00002-of-00002.safetensors": {"b": B}}, 1),
        ({"model.bin": A}, 1),
    ],
)
def test_names_that_other_tools_give_to_weights(tmp_path: Path, files: dict[str, Any], chosen: int) -> None:
    for name, content in files.items():
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(content))
            continue
        tensors = content if isinstance(content, dict) else {"a": content}
        if name.endswith(".safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            write_torch_file(tmp_path / name, tensors)
    found = open_checkpoint(tmp_path)
    assert (values(found)["a"], found.faults) == (chosen, ())


def test_an_index_of_another_name(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / f"{GPTQ}-00001-of-00002.safetensors")
    save_file({"b": B}, tmp_path / f"{GPTQ}-00002-of-00002.safetensors")
    places = {name: f"{GPTQ}-0000{number}-of-00002.safetensors" for number, name in ((1, "a"), (2, "b"))}
    index(tmp_path, places, f"{GPTQ}.safetensors.index.json")
    assert values(open_checkpoint(tmp_path)) == {"a": 1, "b": 2}


def test_several_sets_of_weights_are_named(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"a": B}, tmp_path / "two.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several sets of weights \(one.safetensors, two.safetensors\); leave one"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shards", [99_999_999, 20_000])
def test_implausible_numbers_of_shards(tmp_path: Path, shards: int) -> None:
    save_file({"a": A}, tmp_path / f"model-00001-of-{shards}.safetensors")
    with pytest.raises(CheckpointError, match=f"counts {shards} shards, 10000 at most"):
        open_checkpoint(tmp_path)
    index(tmp_path, {str(number): f"{number}.safetensors" for number in range(10_001)})
    assert open_checkpoint(tmp_path).faults == (
        "model.safetensors.index.json: names 10001 shards, 10000 at most; download it again",
    )
