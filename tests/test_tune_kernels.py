"""The tuner: what it picks, writes, skips and refuses."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tune_kernels
from kernel_timing import Op
from tune_kernels import BACKENDS, Task, agrees, find_tasks, read_table, table_path, tune, write_tiles

from pallas_kernels import tuning
from pallas_kernels.dispatch import OPS
from pallas_kernels.offline import DEVICES
from pallas_kernels.target import current_target
from pallas_kernels.w8a8_matmul.tiles import Tiles

W8A8 = Op("w8a8_matmul")
IN_PLACE = ("decode_layer", "kv_cache_write")
"""Ops whose pool has to be donated, or XLA copies it."""


@pytest.mark.parametrize("name", OPS)
def test_what_scripts_ask_of_an_op(name: str) -> None:
    """Each op describes its real shapes to bench, tuner and static check."""
    shapes = Op(name).shapes
    assert shapes.TEST_SHAPES
    for shape in shapes.SHAPES:
        nbytes, operations = shapes.cost(shape)
        assert nbytes > 0
        assert operations > 0
        assert shape.phase in ("decode", "prefill")
    shape = shapes.SHAPES[0]
    assert shapes.key_for(shape)
    candidates = list(shapes.candidates_for(shape))
    assert len(candidates) == len(set(candidates)) > 1
    assert type(shapes.tiles_for(shape, "h200")) is type(candidates[0])
    assert shapes.elements_per_trip(shape, candidates[0])
    assert name not in IN_PLACE or Op(name).carry


def candidates(*tiles: Tiles) -> Any:
    return lambda shape: iter(tiles)


GOOD = (Tiles(16, 32, 32, 1, 4, 2), Tiles(16, 64, 64, 2, 4, 2))
REFUSED = Tiles(16, 32, 512, 1, 4, 2)


def test_the_fastest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = W8A8.shapes.Shape("tuned", 3, 256, 64)
    monkeypatch.setattr(W8A8.shapes, "candidates_for", candidates(REFUSED, *GOOD))
    monkeypatch.setattr(tune_kernels, "take_turns", lambda programs, rounds: {n: [9.0 - int(n)] for n in programs})
    line = tune(Task(W8A8, shape), 1, tmp_path)
    assert "(3 candidates, 1 failed, 0 wrong)" in line
    table = json.loads(table_path(tmp_path, "w8a8_matmul").read_text())
    assert list(table) == ["schema", "device", "versions", "tiles"]
    assert Tiles(**table["tiles"][W8A8.shapes.key_for(shape)]) == GOOD[1]


def test_wrong_tiles_are_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = W8A8.shapes.Shape("tuned", 3, 256, 64)
    monkeypatch.setattr(W8A8.shapes, "candidates_for", candidates(GOOD[0]))
    monkeypatch.setattr(tune_kernels, "expected", lambda op, arguments: jnp.ones((3, 64), jnp.bfloat16))
    line = tune(Task(W8A8, shape), 1, tmp_path)
    assert "nothing to choose from: 1 candidates, 0 failed, 1 wrong" in line
    assert not any(tmp_path.rglob("*.json"))


def test_each_candidate_starts_from_the_same_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rms_norm carries its results into the next call; that must not make the next candidate look wrong."""
    op = Op("rms_norm")
    shape = op.shapes.TEST_SHAPES[0]
    tiles = list(op.shapes.candidates_for(shape))[:3]
    monkeypatch.setattr(op.shapes, "candidates_for", candidates(*tiles))
    assert "(3 candidates, 0 failed, 0 wrong)" in tune(Task(op, shape), 1, tmp_path)


def test_a_table_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, nothing half-written is left, and the op reads it back."""
    path = table_path(tmp_path, "w8a8_matmul")
    for tiles, key in zip(GOOD, ("b", "a"), strict=True):
        write_tiles(path, key, dict(vars(tiles)))
    assert list(read_table(path)) == ["a", "b"]
    assert [p.name for p in path.parent.iterdir()] == ["w8a8_matmul.json"]
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    try:
        assert tuning.choose("w8a8_matmul", current_target().kind, "a", None, GOOD[0]) == GOOD[1]
        assert tuning.choose("w8a8_matmul", current_target().kind, "c", None, GOOD[0]) == GOOD[0]
    finally:
        tuning.table.cache_clear()


def flags(folder: Path, **given: Any) -> argparse.Namespace:
    shapes = re.compile(given.pop("shapes", ""))
    default = {"ops": ["w8a8_matmul"], "backends": list(BACKENDS), "again": False}
    return argparse.Namespace(**{**default, "folder": folder, "shapes": shapes, **given})


def test_a_run_carries_on(tmp_path: Path) -> None:
    tasks = list(find_tasks(flags(tmp_path)))
    keys = [task.key for task in tasks]
    assert len(keys) == len(set(keys)) == len({W8A8.shapes.key_for(shape) for shape in W8A8.shapes.SHAPES})
    write_tiles(table_path(tmp_path, "w8a8_matmul"), keys[0], {})
    assert [task.key for task in find_tasks(flags(tmp_path))] == keys[1:]
    assert [task.key for task in find_tasks(flags(tmp_path, again=True))] == keys
    assert {task.shape.model for task in find_tasks(flags(tmp_path, shapes="Llama-3-8B down M=16"))} == {
        "Llama-3-8B down"
    }


def test_a_backend_with_tiles_of_its_own_has_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(W8A8, W8A8.shapes.Shape("tuned", 3, 256, 64))
    monkeypatch.setattr(task.module, "TABLE", "w8a8_matmul_other", raising=False)
    monkeypatch.setattr(task.module, "candidates_for", candidates(GOOD[0]), raising=False)
    assert "(1 candidates, 0 failed, 0 wrong)" in tune(task, 1, tmp_path)
    assert list(read_table(table_path(tmp_path, "w8a8_matmul_other"))) == [task.key]
    assert not table_path(tmp_path, "w8a8_matmul").exists()


@pytest.mark.parametrize("name", ["paged_attention", "w4a16_matmul"])
def test_hopper_is_tuned_for_what_it_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = flags(tmp_path, ops=[name], backends=["pallas_mosaic_gpu"])
    tasks = list(find_tasks(wanted))
    assert tasks
    for task in tasks:
        assert task.table == f"{name}_hopper"
        assert task.shape.phase == "prefill"
        assert getattr(task.shape, "kv", "bf16") == "bf16"
        assert {type(tiles) for tiles in task.candidates()} == {task.module.HopperTiles}
    monkeypatch.setattr(tune_kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(tune_kernels, "current_target", lambda: DEVICES["a100"].target)
    assert not list(find_tasks(wanted))
    assert list(find_tasks(flags(tmp_path, ops=[name])))


def test_agreement_is_within_rounding() -> None:
    truth = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.bfloat16)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert agrees([truth * jnp.bfloat16(1 + eps)], [truth])
    assert not agrees([truth * jnp.bfloat16(1 + 4 * eps)], [truth])
    assert not agrees([truth, truth], [truth, truth.at[5].set(0)])
    assert not agrees([truth.astype(jnp.float32) * (1 + eps)], [truth.astype(jnp.float32)])
    assert not agrees([truth.at[0, 0].set(jnp.nan)], [truth])
    assert agrees([jnp.zeros(3)], [jnp.zeros(3)])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tune_kernels", *arguments])
    return tune_kernels.main()


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_main(monkeypatch) == 2
    assert capsys.readouterr().err == "tune_kernels needs a GPU; --dry-run lists what it would time\n"


def test_a_dry_run_lists_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ("--dry-run", "--ops", "rms_norm", "--shapes", "Qwen.* T=16 ", "--folder", str(tmp_path))
    assert run_main(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "candidates for 't16 d3584 bfloat16 residual'" in out
    assert "is right" in out
    monkeypatch.setattr(tune_kernels, "agrees", lambda result, truth: False)
    assert run_main(monkeypatch, *arguments) == 1
    assert "is WRONG" in capsys.readouterr().out
