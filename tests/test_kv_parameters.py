"""Calibrated KV parameters: the files of LMDeploy v0.3, and what ``quant_policy`` makes of them."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxdeploy.checkpoint.kv_parameters import read_kv_parameters, write_kv_parameters
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.kv_policy import kv_policy
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.decoder import cache_layouts
from tests.tiny_models import CONFIG, attention_of, changed

LAYERS, KV_HEADS = CONFIG.num_layers, attention_of(CONFIG).num_kv_heads
LAYOUTS = cache_layouts(CONFIG)
NAME = "layers.{}.past_kv_scale.{}.weight"


def put(folder: Path, layer: int, rank: int, *values: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME.format(layer, rank)).write_bytes(struct.pack(f"<{len(values)}f", *values))


def test_files_of_one_rank(tmp_path: Path) -> None:
    for layer in range(LAYERS):
        put(tmp_path, layer, 0, 0.5 + layer, 1, 2, -3)
    read = read_kv_parameters(tmp_path, LAYOUTS)
    assert read is not None
    assert {ranges.dtype for ranges in read} == {np.dtype(np.float16)}
    keys, values = ([0.5, 1 - 64], [1.5, 1 - 192]), [2, -3 - 256]
    np.testing.assert_array_equal(read, [[[key] * KV_HEADS, [values] * KV_HEADS] for key in keys])


def test_ranks_cut_the_heads_evenly_and_lie_in_a_converted_model(tmp_path: Path) -> None:
    for layer in range(LAYERS):
        for rank in range(2):
            put(tmp_path / "triton_models/weights", layer, rank, 1 + rank, 0, 1, 0)
    read = read_kv_parameters(tmp_path, LAYOUTS)
    assert read is not None
    assert [ranges[0, :, 0].tolist() for ranges in read] == [[1, 1, 2, 2]] * LAYERS


def test_symmetric_files_have_no_zero_points(tmp_path: Path) -> None:
    for layer in range(LAYERS):
        put(tmp_path, layer, 0, 0.25, 0.75)
    read = read_kv_parameters(tmp_path, [HeadsLayout(1, 8, 8)] * LAYERS)
    assert read is not None
    assert [ranges.tolist() for ranges in read] == [[[[0.25, -32]], [[0.75, -96]]]] * LAYERS


def test_what_is_written_is_read(tmp_path: Path) -> None:
    parameters = np.random.default_rng(0).uniform(0.01, 1, (LAYERS, 4)).astype(np.float32)
    write_kv_parameters(tmp_path, parameters)
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [16] * LAYERS
    for layer, row in enumerate(parameters):
        assert (tmp_path / NAME.format(layer, 0)).read_bytes() == struct.pack("<4f", *row)
    read = read_kv_parameters(tmp_path, LAYOUTS)
    assert read is not None
    expected = [layout.ranges(rows[None]) for layout, rows in zip(LAYOUTS, parameters, strict=True)]
    np.testing.assert_array_equal(read, expected)


def test_a_folder_without_them(tmp_path: Path) -> None:
    (tmp_path / "layers.0.attention.wo.0.weight").write_bytes(b"something else of a converted model")
    assert read_kv_parameters(tmp_path, LAYOUTS) is None


def test_every_fault_is_listed(tmp_path: Path) -> None:
    put(tmp_path, 0, 0, 1, 2, 3)
    put(tmp_path, 1, 0, 0, 1, 1, 1)
    put(tmp_path, 2, 0, 1, 1, 1, float("nan"))
    put(tmp_path, 3, 0, 1e30, 1, 1, 1)
    put(tmp_path, 5, 0, 1, 1, 1, 1)
    (tmp_path / NAME.format(6, 0)).mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_kv_parameters(tmp_path, [HeadsLayout(KV_HEADS, 8, 8)] * 7)
    title, *faults = str(caught.value).splitlines()
    assert title == "The KV parameters do not fit:"
    assert faults == [
        "  layers.4.past_kv_scale.0.weight: is missing; calibrate again",
        "  layers.0.past_kv_scale.0.weight: has 12 bytes, 16 expected (8 without zero points); calibrate again",
        "  layers.1.past_kv_scale.0.weight: scale 0 with zero point 1 does not fit float16; calibrate again",
        "  layers.2.past_kv_scale.0.weight: scale 1 with zero point nan does not fit float16; calibrate again",
        "  layers.3.past_kv_scale.0.weight: scale 1e+30 with zero point 1 does not fit float16; calibrate again",
        f"  {tmp_path / NAME.format(6, 0)} is not a regular file; replace it by one",
    ]


def test_of_another_model(tmp_path: Path) -> None:
    for layer in range(3):
        for rank in range(3):
            put(tmp_path, layer, rank, 1, 0, 1, 0)
    with pytest.raises(CheckpointError) as caught:
        read_kv_parameters(tmp_path, LAYOUTS)
    assert "layers.2.past_kv_scale.1.weight: the model has 2 layers; calibrate again" in str(caught.value)
    assert "3 ranks cannot share 4 KV heads evenly; calibrate again for one rank" in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "large", "rank"])
def test_files_that_would_hang(tmp_path: Path, kind: str) -> None:
    """A pipe, a large file, and a name that stands for many others."""
    write_kv_parameters(tmp_path, np.full((LAYERS, 4), 0.5, np.float32))
    file = tmp_path / "layers.0.past_kv_scale.0.weight"
    if kind == "rank":
        file.rename(tmp_path / "layers.0.past_kv_scale.9999.weight")
    else:
        file.unlink()
        os.mkfifo(file) if kind == "fifo" else file.touch()
    if kind == "large":
        os.truncate(file, 2**40)
    with pytest.raises(CheckpointError, match=r"not a regular file|1024 at most are read|10000 ranks cannot share"):
        read_kv_parameters(tmp_path, LAYOUTS)


def test_integers_stand_for_what_they_stood_for_in_v03() -> None:
    """Scale · q + zero point with q from −128 on is our scale · q + zero with q from 0 on."""
    ranges = HeadsLayout(2, 8, 8).ranges(np.array([[0.5, 3.0, 0.25, -2.0], [0.125, 0.0, 1.0, 1.0]], np.float32))
    assert ranges.dtype == np.float16
    assert ranges.tolist() == [[[0.5, 3 - 64], [0.125, -16]], [[0.25, -2 - 32], [1.0, 1 - 128]]]


WIDE = changed(CONFIG, head_dim=128)
FOUR_IS_INT4 = "quant_policy=4 is int4, as in LMDeploy since v0.4; in v0.3 it meant int8, which is 8"
COSTLY = "quant_policy=4 may cost much quality here: "


@pytest.mark.parametrize(
    ("policy", "config", "bits", "lines"),
    [
        (0, WIDE, None, []),
        (8, changed(CONFIG, qkv_bias=True), 8, []),
        (4, WIDE, 4, [FOUR_IS_INT4]),
        (
            4,
            changed(WIDE, qkv_bias=True),
            4,
            [
                FOUR_IS_INT4,
                f"{COSTLY}biased keys have a few channels far from the others (known of Qwen2.5); 8 is safer",
            ],
        ),
        (4, changed(WIDE, head_dim=48), 4, [FOUR_IS_INT4, f"{COSTLY}head_dim=48 is below 64; 8 is safer"]),
    ],
)
def test_what_a_policy_means(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: int, config: object, bits: int | None, lines: list[str]
) -> None:
    assert isinstance(config, type(CONFIG))
    settings, biased = EngineConfig(quant_policy=policy), attention_of(config).qkv_bias
    assert kv_policy(tmp_path, cache_layouts(config), settings, biased_keys=biased) == (bits, None)
    assert [record.getMessage() for record in caplog.records] == lines
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_four_is_int8_where_v03_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_kv_parameters(tmp_path, np.full((LAYERS, 4), 0.5, np.float32))
    bits, ranges = kv_policy(tmp_path, LAYOUTS, EngineConfig(quant_policy=4))
    assert bits == 8
    assert ranges is not None
    assert [layer.shape for layer in ranges] == [(2, KV_HEADS, 2)] * LAYERS
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "quant_policy=4: KV parameters of LMDeploy v0.3 are there, where 4 meant int8; the KV cache is int8 with their "
        "calibrated ranges"
    )
    assert kv_policy(tmp_path, LAYOUTS, EngineConfig(quant_policy=8)) == (8, None)
    assert kv_policy(tmp_path, LAYOUTS, EngineConfig()) == (None, None)


@pytest.mark.parametrize("policy", [4, 8])
def test_an_odd_head_dim(tmp_path: Path, policy: int) -> None:
    with pytest.raises(ConfigError, match=f"quant_policy={policy} needs an even head_dim, not 5; leave it out"):
        kv_policy(tmp_path, [HeadsLayout(4, 5, 5)], EngineConfig(quant_policy=policy))
