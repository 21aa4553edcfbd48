from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxdeploy.checkpoint.pickle_reader import read_torch_file
from jaxdeploy.errors import CheckpointError
from tests.torch_zip import (
    call,
    glob,
    mapping,
    number,
    numbers,
    rebuild,
    storage,
    text,
    tup,
    write_torch_file,
    write_zip,
)

FLOATS = glob("torch", "FloatStorage")
DATA = np.arange(12, dtype=np.float32)


def one_tensor(file: Path, tensor: bytes) -> Path:
    return write_zip(file, mapping({"x": tensor}), {"0": DATA.tobytes()})


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
)
def test_every_dtype(tmp_path: Path, dtype: type) -> None:
    value: Any = np.arange(6).reshape(2, 3).astype(dtype)
    tensors = read_torch_file(write_torch_file(tmp_path / "a.bin", {"x": value, "empty": value[:0]}))
    assert (tensors["x"].shape, tensors["x"].dtype, tensors["x"].nbytes) == ((2, 3), value.dtype, value.nbytes)
    np.testing.assert_array_equal(tensors["x"].read(), value)
    assert tensors["empty"].read().shape == (0, 3)


def test_data_is_mapped_and_read_only(tmp_path: Path) -> None:
    ref = read_torch_file(write_torch_file(tmp_path / "a.bin", {"x": DATA}))["x"]
    assert not ref.read().flags.writeable


def test_views_that_share_a_storage(tmp_path: Path) -> None:
    held = storage(FLOATS, "0", 12)
    content = mapping(
        {
            "whole": rebuild(held, 0, (3, 4), (4, 1)),
            "transposed": rebuild(held, 0, (4, 3), (1, 4)),
            "column": rebuild(held, 1, (3,), (4,)),
            "repeated": rebuild(held, 5, (2, 3), (0, 1)),
            "scalar": rebuild(held, 7, (), ()),
        }
    )
    tensors = read_torch_file(write_zip(tmp_path / "a.bin", content, {"0": DATA.tobytes()}))
    grid = DATA.reshape(3, 4)
    np.testing.assert_array_equal(tensors["whole"].read(), grid)
    np.testing.assert_array_equal(tensors["transposed"].read(), grid.T)
    np.testing.assert_array_equal(tensors["column"].read(), grid[:, 1])
    np.testing.assert_array_equal(tensors["repeated"].read(), [[5, 6, 7], [5, 6, 7]])
    assert tensors["scalar"].read() == 7


def test_parameters_and_untyped_storages(tmp_path: Path) -> None:
    untyped = storage(glob("torch.storage", "UntypedStorage"), "0", 48)
    halves = rebuild(untyped, 2, (4,), (1,), glob("torch", "bfloat16"))
    parameter = call(
        glob("torch._utils", "_rebuild_parameter"), rebuild(storage(FLOATS, "0", 12), 0, (12,), (1,)), b"\x88", b"}"
    )
    file = write_zip(tmp_path / "a.bin", mapping({"h": halves, "p": parameter}), {"0": DATA.tobytes()})
    tensors = read_torch_file(file)
    np.testing.assert_array_equal(tensors["p"].read(), DATA)
    np.testing.assert_array_equal(tensors["h"].read(), DATA.view(ml_dtypes.bfloat16)[2:6])


def test_other_entries_are_left_out(tmp_path: Path) -> None:
    content = mapping({"x": rebuild(storage(FLOATS, "0", 12), 0, (12,), (1,)), "step": number(3), "none": b"N"})
    assert list(read_torch_file(write_zip(tmp_path / "a.bin", content, {"0": DATA.tobytes()}))) == ["x"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.fromkeys"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy", "memmap"),
        ("functools", "partial"),
    ],
)
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL", "INST"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, module: str, name: str, opcode: str) -> None:
    argument = text(f"touch {tmp_path}/ran")
    content = {
        "GLOBAL": call(glob(module, name), argument),
        "STACK_GLOBAL": text(module) + text(name) + b"\x93" + tup(argument) + b"R",
        "INST": b"(" + argument + f"i{module}\n{name}\n".encode(),
    }[opcode]
    file = write_zip(tmp_path / "evil.bin", mapping({"x": content}), {})
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(file)
    assert str(caught.value) == (
        f"evil.bin: asks for {module}.{name}, which is no part of a tensor, and was refused; use a safetensors copy"
    )
    assert os.listdir(tmp_path) == ["evil.bin"]


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(rebuild(storage(FLOATS, "0", 12), 0, (13,), (1,)), id="too long"),
        pytest.param(rebuild(storage(FLOATS, "0", 12), 1, (3, 4), (4, 1)), id="shifted"),
        pytest.param(rebuild(storage(FLOATS, "0", 12), -1, (2,), (1,)), id="negative offset"),
        pytest.param(rebuild(storage(FLOATS, "0", 12), 11, (2,), (-1,)), id="negative stride"),
        pytest.param(rebuild(storage(FLOATS, "0", 12), 0, (2, 2), (1,)), id="too few strides"),
        pytest.param(rebuild(storage(FLOATS, "0", 1000), 0, (1000,), (1,)), id="storage is shorter"),
        pytest.param(rebuild(storage(FLOATS, "9", 12), 0, (12,), (1,)), id="no such storage"),
        pytest.param(rebuild(storage(FLOATS, "../version", 1), 0, (1,), (1,)), id="other member"),
        pytest.param(rebuild(storage(number(5), "0", 12), 0, (12,), (1,)), id="no storage type"),
        pytest.param(rebuild(text("0"), 0, (12,), (1,)), id="no storage"),
        pytest.param(
            rebuild(storage(FLOATS, "0", 12), 0, (12,), (1,)) + b"}" + text("shape") + numbers((10**6,)) + b"sb",
            id="changed after the check",
        ),
        pytest.param(
            rebuild(storage(FLOATS, "0", 12), 0, (12,), (1,)) + b"N}" + text("shape") + numbers((10**6,)) + b"s\x86b",
            id="slots changed after the check",
        ),
        pytest.param(call(FLOATS, number(3)), id="storage called"),
        pytest.param(call(glob("torch._utils", "_rebuild_parameter"), number(3)), id="parameter of no tensor"),
    ],
)
def test_nothing_outside_a_storage_is_read(tmp_path: Path, tensor: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^a\.bin: ") as caught:
        read_torch_file(one_tensor(tmp_path / "a.bin", tensor))
    assert "\n" not in str(caught.value)


def test_short_storage_says_how_short(tmp_path: Path) -> None:
    file = write_zip(
        tmp_path / "a.bin", mapping({"x": rebuild(storage(FLOATS, "0", 12), 0, (12,), (1,))}), {"0": bytes(40)}
    )
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(file)
    assert str(caught.value) == "a.bin: truncated: storage of x has 40 of 48 bytes; download it again"


def test_truncated_file(tmp_path: Path) -> None:
    file = write_torch_file(tmp_path / "a.bin", {"x": DATA})
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(file)
    expected = "a.bin: truncated: 150 bytes, the zip directory at its end is missing; download it again"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch's format from before 1.6 is not read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a torch checkpoint; .*git lfs pull"),
        (b"<html>", "not a torch checkpoint; download it again$"),
        (b"", "not a torch checkpoint; download it again$"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(start + b"." * 30 if start else b"")
    with pytest.raises(CheckpointError, match=f"^a.bin: {message}"):
        read_torch_file(tmp_path / "a.bin")


def test_other_zip_files(tmp_path: Path) -> None:
    packed = write_zip(tmp_path / "a.bin", mapping({}), {"0": bytes(99)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"^a.bin: archive/data.pkl is compressed or encrypted"):
        read_torch_file(packed)
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(CheckpointError, match=r"^b.bin: a zip file without data.pkl is not a torch checkpoint"):
        read_torch_file(tmp_path / "b.bin")
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match=r"^a.bin: written on a big-endian machine"):
        read_torch_file(tmp_path / "a.bin")


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", b"\x80\x02K\x01.", b"garbage", b"\x80\x02(K\x01e."])
def test_damaged_pickles(tmp_path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(CheckpointError, match=r"^a.bin: (its pickle is damaged|holds a int, not a dict)"):
        read_torch_file(tmp_path / "a.bin")


@pytest.mark.parity
def test_what_torch_writes(tmp_path: Path) -> None:
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "parameter": torch.nn.Parameter(base.clone()),
        "bf16": base.to(torch.bfloat16),
        "fp8": base.to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "int": torch.arange(5),
        "bool": base > 3,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    torch.save(state, tmp_path / "a.bin")
    tensors = read_torch_file(tmp_path / "a.bin")
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        plain = value.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(tensors[name].read().astype(np.float64), plain, err_msg=name)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "b.bin")
    assert read_torch_file(tmp_path / "b.bin").keys() == {"weight", "bias"}


@pytest.mark.parity
def test_what_old_torch_wrote(tmp_path: Path) -> None:
    import torch

    torch.save({"x": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"^a.bin: torch's format from before 1.6 is not read; load and save it"):
        read_torch_file(tmp_path / "a.bin")
