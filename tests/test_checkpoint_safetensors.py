from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.errors import CheckpointError

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def written(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
)
def test_what_the_library_writes(tmp_path: Path, dtype: type) -> None:
    value: Any = X.astype(dtype)
    save_file({"x": value, "scalar": value[0, 1:2].reshape(()), "empty": value[:0]}, tmp_path / "a.safetensors")
    tensors = read_safetensors_file(tmp_path / "a.safetensors")
    assert (tensors["x"].shape, tensors["x"].dtype, tensors["x"].nbytes) == ((2, 3), value.dtype, value.nbytes)
    np.testing.assert_array_equal(tensors["x"].read(), value)
    assert tensors["scalar"].read() == value[0, 1]
    assert tensors["empty"].read().shape == (0, 3)


def test_data_at_an_odd_offset(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]}}
    file = written(tmp_path / "a.safetensors", header, b"?" + X.tobytes())
    np.testing.assert_array_equal(read_safetensors_file(file)["x"].read(), X)


@pytest.mark.parametrize("kept", [0, 3, 40, -1])
def test_truncated_file_says_what_is_missing(tmp_path: Path, kept: int) -> None:
    save_file({"x": X}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:kept])
    size = len(whole[:kept])
    header = 8 + int.from_bytes(whole[:8], "little")
    expected = 8 if size < 8 else header if size < header else len(whole)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_file(tmp_path / "a.safetensors")
    assert str(caught.value) == f"a.safetensors: truncated: {size} bytes, {expected} expected; download it again"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{oops", r"its header is not JSON \(.*\); download it again"),
        ([], "its header is not a JSON object; download it again"),
        ({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, "header entry of x is damaged"),
        ({"x": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}, "header entry of x is damaged"),
        ({"x": {"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}}, "header entry of x is damaged"),
        ({"x": {"dtype": "F32", "shape": ["6"], "data_offsets": [0, 24]}}, "header entry of x is damaged"),
        ({"x": {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]}}, "header entry of x is damaged"),
        ({"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}, "header entry of x is damaged"),
        ({"x": {"dtype": [], "shape": [6], "data_offsets": [0, 24]}}, "x has dtype .*, which is not read"),
        ({"x": {"shape": [6]}}, "header entry of x is damaged"),
        (
            {"x": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}},
            "x has dtype F4, which is not read; known are F64",
        ),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^a\.safetensors: {message}"):
        read_safetensors_file(written(tmp_path / "a.safetensors", header, X.tobytes()))


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"not a safetensors file; .*run `git lfs pull`"):
        read_safetensors_file(tmp_path / "a.safetensors")
