"""Model folders changed at random: each is loaded, or refused in printable lines, in time and within 1 GB."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.fuzzed_folder import Base, build, load, run_case

CASES = 80
MANY_CASES = 1500
SECONDS, GROWTH = 10.0, 1e9


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return build(tmp_path_factory.mktemp("folders"))


def test_sane_folders_are_loaded(bases: list[Base]) -> None:
    for base in bases:
        load(base.folder, adapter=base.adapter)


def test_changed_folders(bases: list[Base], tmp_path: Path) -> None:
    ends = [_checked(run_case(bases, case, tmp_path / "case")) for case in range(CASES)]
    assert {"loaded", "refused"} == set(ends)


@pytest.mark.slow
def test_many_changed_folders(tmp_path: Path) -> None:
    """A subprocess reads the folders, so that a crash or a hang is the fault of one case."""
    command = [sys.executable, "-m", "tests.fuzzed_folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for case in range(MANY_CASES):
                process.stdin.write(f"{case}\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], 6 * SECONDS)
                assert ready, f"case {case} hangs"
                found = json.loads(process.stdout.readline())
                _checked(found)
                assert found["seconds"] < SECONDS, found
                assert found["grown"] < GROWTH, found
        finally:
            process.kill()


def _checked(found: dict[str, Any]) -> str:
    """How a case ended. The message of one that was refused is short and printable."""
    assert found["end"] in ("loaded", "refused"), f"case {found['case']}, {found['what']}:\n{found['message']}"
    lines = found.get("message", "").split("\n")
    assert all(line.isprintable() and len(line) <= 1100 for line in lines), found
    return str(found["end"])
