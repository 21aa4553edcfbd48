"""Which files a quantisation may replace: those that the marker of a folder lists, and no others."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from bench_record import result_path, save_figure, write_result

from jaxdeploy.chat.session import Conversation
from jaxdeploy.checkpoint.marker import NAME, Marker, foreign_files, read_marker, remove_ours
from jaxdeploy.cli import check_env
from jaxdeploy.compress import folder_lock, folder_swap
from jaxdeploy.compress.beside_model import BesideModel
from jaxdeploy.compress.work_dir import WorkDir
from jaxdeploy.config import ChatTemplateConfig
from jaxdeploy.errors import ConfigError, JaxdeployError
from jaxdeploy.files.atomic import put_file, put_text


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model as it comes from a hub, with files that are no weights."""
    folder = tmp_path / "models" / "source"
    for name in ("config.json", "tokenizer.json", "README.md", "modeling.py", "original/weights.pth", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def begin(source: Path, target: Path | str, *, overwrite: bool = False, run: str = "a") -> WorkDir:
    return WorkDir(target, source=source, layers=1, command="lite rtn", run={"run": run}, overwrite=overwrite)


def write(source: Path, target: Path, value: float = 0.0, *, overwrite: bool = False) -> None:
    """A whole run whose only tensor holds ``value``."""
    work = begin(source, target, overwrite=overwrite, run=str(value))
    work.write_layer(0, {"layer": np.full(3, value, np.float32)}, {"linears": []})
    work.write_rest({"value": value}, {"rest": np.zeros(2, np.float32)})
    work.take_name()


def test_a_marker_lists_what_was_written(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out")
    marker = read_marker(tmp_path / "out")
    assert marker.command == "lite rtn"
    assert marker.files | {NAME} == {file.name for file in (tmp_path / "out").iterdir()}
    assert foreign_files(tmp_path / "out") == []


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two renames"])
def test_overwrite_replaces_an_earlier_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(folder_swap, "_exchange", lambda *_: False)
    write(source, tmp_path / "out", 1.0)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty; name another, or add --overwrite"):
        begin(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    write(source, tmp_path / "out", 2.0, overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() != before["config.json"].decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


def in_other_folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def marked_with_a_thesis(tmp_path: Path) -> Path:
    write(tmp_path / "models/source", tmp_path / "out")
    return tmp_path / "out"


def linked_model(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "models/source")
    return tmp_path / "link"


def model_with_a_marker(tmp_path: Path) -> Path:
    folder = tmp_path / "models/source"
    Marker("lite merge_lora", frozenset(os.listdir(folder))).write(folder)
    return folder


PLACES: list[tuple[Callable[[Path], Path], str]] = [
    (in_other_folder, "did not write .thesis.txt.; name another folder"),
    (marked_with_a_thesis, "did not write .thesis.txt.; name another folder"),
    (lambda tmp_path: tmp_path / "models/source", "is the folder of the model itself; name another"),
    (lambda tmp_path: tmp_path / "models/source/../source/", "is the folder of the model itself"),
    (linked_model, "is the folder of the model itself"),
    (model_with_a_marker, "is the folder of the model itself"),
    (lambda tmp_path: tmp_path / "models", "did not write"),
    (lambda tmp_path: tmp_path / "models/source/tokenizer.json", "is a file; name a folder"),
    (lambda tmp_path: Path("."), "is the current folder or the root"),
    (lambda tmp_path: Path("/"), "is the current folder or the root"),
    (lambda tmp_path: Path("~"), "did not write .thesis.txt."),
]


@pytest.mark.parametrize(("place", "message"), PLACES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_never_replaced(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[Path], Path],
    message: str,
    overwrite: bool,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    target = place(tmp_path)
    for folder in (tmp_path / "home", tmp_path / "out"):
        folder.mkdir(exist_ok=True)
        (folder / "thesis.txt").write_text("years of work")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=message):
        begin(source, target, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_partial_and_old_folders_of_others_stay(source: Path, tmp_path: Path) -> None:
    for name in ("out.partial", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"out\.partial first, which holds files of others .thesis\.txt."):
        begin(source, tmp_path / "out")
    (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
    write(source, tmp_path / "out", 1.0)
    write(source, tmp_path / "out", 2.0, overwrite=True)
    assert (tmp_path / "out.old" / "thesis.txt").exists()


def test_a_model_or_result_named_partial_stays(source: Path, tmp_path: Path) -> None:
    """Its marker alone does not make it the partial folder of a run."""
    write(source, tmp_path / "out.partial", 1.0)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"out\.partial first, which holds a finished result; move that folder away"):
        begin(source, tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match=r"out\.partial first, which holds the model itself; move that folder away"):
        begin(tmp_path / "out.partial", tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_what_a_crash_after_the_exchange_left_is_replaced(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", 1.0)
    write(source, tmp_path / "new", 2.0)
    finished = read_marker(tmp_path / "new")
    Marker(finished.command, finished.files, "a run").write(tmp_path / "new")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "new").rename(tmp_path / "out")
    write(source, tmp_path / "out", 3.0, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


def test_two_processes_cannot_write_to_one_folder(source: Path, tmp_path: Path) -> None:
    begin(source, tmp_path / "out").write_layer(0, {"layer": np.zeros(3, np.float32)}, {})
    before = snapshot(tmp_path)
    held = folder_lock._held.pop(tmp_path / "out.partial")  # as if another process had it
    with pytest.raises(ConfigError, match=r"out is being written by another process; wait until it ends, or name"):
        begin(source, tmp_path / "out", run="b")
    assert snapshot(tmp_path) == before
    os.close(held)
    write(source, tmp_path / "out")
    assert tmp_path / "out.partial" not in folder_lock._held


def test_a_result_that_appears_during_a_run_stays(source: Path, tmp_path: Path) -> None:
    work = begin(source, tmp_path / "out")
    write(source, tmp_path / "other", 1.0)
    (tmp_path / "other").rename(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not empty; name another, or add --overwrite"):
        work.take_name()
    assert snapshot(tmp_path) == before


def test_a_mount_point_is_refused_at_the_start(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == "/mnt/results")
    with pytest.raises(ConfigError, match="/mnt/results is a mount point, which cannot be renamed; name a folder in"):
        begin(source, "/mnt/results")


def test_files_added_during_a_run_stop_the_replacement(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", 1.0)
    work = begin(source, tmp_path / "out", overwrite=True, run="b")
    work.write_layer(0, {"layer": np.zeros(3, np.float32)}, {})
    work.write_rest({}, {})
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"did not write .thesis\.txt."):
        work.take_name()
    assert snapshot(tmp_path) == before


def test_a_linked_work_dir_keeps_its_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    write(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/out/config.json").exists()


def test_a_crash_between_the_renames_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged in one step, both folders are on the disk at any time."""
    write(source, tmp_path / "out", 1.0)
    monkeypatch.setattr(folder_swap, "_exchange", lambda *_: False)
    rename, renames = Path.rename, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "out", 2.0, overwrite=True)
    found = [marker for marker in map(read_marker, tmp_path.iterdir()) if marker.files]
    assert len(found) == 2
    write(source, tmp_path / "out", 2.0)
    assert read_marker(tmp_path / "out").run == ""


@pytest.mark.parametrize("listed", [["../thesis.txt", "/etc/passwd", "..", "sub/file"], ["folder"], "thesis.txt", None])
def test_a_marker_cannot_name_what_is_outside(source: Path, tmp_path: Path, listed: object) -> None:
    (tmp_path / "out" / "folder").mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("years of work")
    marker = {"tool": "jaxdeploy", "command": "lite rtn", "files": listed}
    (tmp_path / "out" / NAME).write_text(str(marker).replace("'", '"').replace("None", "null"))
    assert "folder" in foreign_files(tmp_path / "out")
    with pytest.raises(ConfigError, match="did not write"):
        begin(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_remove_ours_leaves_the_rest(tmp_path: Path) -> None:
    Marker("lite rtn", frozenset({"mine"})).write(tmp_path)
    for name in ("mine", ".mine.12.tmp", "theirs", ".theirs.12.tmp"):
        (tmp_path / name).write_text("x")
    remove_ours(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".theirs.12.tmp", "theirs"]


def test_beside_a_model_nothing_foreign_is_replaced(source: Path) -> None:
    """KV parameters that LMDeploy wrote stay, with ``overwrite`` too."""
    (source / "layers.1.past_kv_scale.0.weight").write_bytes(b"theirs")
    before = snapshot(source)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds layers\.1\..*, which jaxdeploy did not write; move that file"):
            BesideModel(source, num_layers=2, overwrite=overwrite)
    assert snapshot(source) == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "old"
    put_text(file, "old")

    def failing(handle: IO[bytes]) -> None:
        handle.write(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        put_file(file, failing)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]
    put_text(Path(os.devnull), "a device stays one")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize(
    "write",
    [
        lambda file: ChatTemplateConfig("internlm2").to_json(file),
        lambda file: Conversation().save(str(file)),
        lambda file: check_env._write(file, {}),
        lambda file: write_result(file, "test/1", {}, {}, {}),
        lambda file: save_figure(None, file),
    ],
    ids=["chat template", "conversation", "environment", "result", "picture"],
)
def test_a_named_file_that_holds_something_else_is_kept(tmp_path: Path, write: Callable[[Path], object]) -> None:
    file = tmp_path / "thesis.tex"
    file.write_text("years of work")
    with pytest.raises(JaxdeployError, match=r"cannot be written \(it exists and holds something else\); name"):
        write(file)
    assert file.read_text() == "years of work"
    with pytest.raises(argparse.ArgumentTypeError, match="holds something else"):
        result_path(str(file))
