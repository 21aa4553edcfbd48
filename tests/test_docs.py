"""What docs/ tells people to do, done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rms_norm as op
from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.rms_norm import rms_norm

KERNELS = Path(__file__).resolve().parents[1] / "docs/kernels.md"


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The worked example of docs/kernels.md, saved and registered as that page says."""
    blocks = re.findall(r"```python\n(.*?)```", KERNELS.read_text("utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "def check_device(target)" in block)
    (tmp_path / "pieces.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pieces", raising=False)
    monkeypatch.setitem(op.BACKENDS, "pieces", "pieces")
    return "pieces"


def test_the_worked_example_norms(pieces: str) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x, scale = (
        jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, ((3, 4096), (4096,)), strict=True)
    )
    got = rms_norm(x, scale, eps=1e-5, backend=pieces)
    np.testing.assert_allclose(got, rms_norm(x, scale, eps=1e-5, backend="reference"), rtol=2e-6)
    with pytest.raises(NoBackendError, match="rms_norm: pieces norms multiples of 1024 without a residual, have D=80"):
        rms_norm(x[:, :80], scale[:80], eps=1e-5, backend=pieces)


@pytest.mark.slow
def test_the_afternoon_with_a_kernel_as_it_is_written(tmp_path: Path) -> None:
    """Save, register and test the example in a copy of the repository, with the commands of the page."""
    root, copy = KERNELS.parents[1], tmp_path / "copy"
    for name in ("jaxdeploy", "pallas_kernels", "tests", "scripts"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", copy)
    page = KERNELS.read_text("utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def check_device(target)" in block
    )
    (where,) = re.findall(r"save it as `(\S+)`", page)
    (line,) = re.findall(r"its preference is: `(.*?)`", page)
    (copy / where).write_text(code)
    package = copy / "pallas_kernels/rms_norm/__init__.py"
    package.write_text(package.read_text().replace('    "reference":', f'    {line},\n    "reference":'))
    (command,) = re.findall(r"\.venv/bin/python (-m pytest \S+)", page)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, *command.split(), "-p", "no:cacheprovider"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "the backend refuses: rms_norm: pieces norms multiples of 1024" in done.stdout
