"""The promises about the repository itself: what lies where, what installs, what the core imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("jaxdeploy", "pallas_kernels", "tests", "scripts", "configs", "docs", "benchmarks"),
}
LEFT_BY_TOOLS = re.compile(r".*\.egg-info|__pycache__|build|dist|work_dir|checkpoints")
UNWANTED = re.compile(r"torch.*|triton|nvidia-.*|cuda-.*|.*-cuda1\d.*|cupy.*")

# Runs in an interpreter of its own. Refuses any import statement of our code that the core may not make; what
# transformers or flax import for themselves passes.
IMPORT_CORE = """
import builtins, importlib, pkgutil, sys

ours = {"jaxdeploy", "pallas_kernels"}
core = {"jax", "jaxlib", "ml_dtypes", "flax", "numpy", "safetensors", "orbax", "transformers", "rich", "tqdm"}
allowed = ours | core | set(sys.stdlib_module_names)
plain_import = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and importer.split(".")[0] in ours and name.split(".")[0] not in allowed:
        raise ImportError(f"{importer} imports {name} at its top; import it in the function that uses it")
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
for package in sys.argv[1:]:
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        importlib.import_module(found.name)
        print(found.name)
"""
CORE_PACKAGES = ("engine", "models", "checkpoint", "parallel")


def base_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def requirements_of(requirement: Requirement) -> list[Requirement]:
    """What an installed package needs here, with the extras it is asked for."""
    needed = [Requirement(text) for text in metadata.requires(requirement.name) or ()]
    extras = requirement.extras or {""}
    return [n for n in needed if n.marker is None or any(n.marker.evaluate({"extra": extra}) for extra in extras)]


def test_top_level_holds_nothing_unexpected() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in names - TOP_LEVEL if not LEFT_BY_TOOLS.fullmatch(name)} == set()
    assert TOP_LEVEL - names == set()


def test_base_dependencies_never_need_torch_or_cuda() -> None:
    waiting, seen = base_requirements(), set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            waiting += requirements_of(requirement)
    assert {name for name, _ in seen if UNWANTED.fullmatch(name)} == set()
    assert len(seen) > len(base_requirements())


@pytest.mark.slow
def test_pip_would_install_neither_torch_nor_cuda(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq", "--report", str(report)]
    subprocess.run([*pip, str(ROOT)], check=True, cwd=tmp_path)
    names = {canonicalize_name(item["metadata"]["name"]) for item in json.loads(report.read_text())["install"]}
    assert {"jax", "flax", "transformers"} <= names
    assert {name for name in names if UNWANTED.fullmatch(name)} == set()


def test_the_reference_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["parity"] == ["torch==2.13.0", "transformers==5.24.0", "peft==0.18.0"]
    assert not [text for name, texts in extras.items() if name != "parity" for text in texts if "torch" in text]


def test_core_imports_with_the_core_packages_alone() -> None:
    packages = ["pallas_kernels", *(f"jaxdeploy.{name}" for name in CORE_PACKAGES)]
    ran = run_python("-c", IMPORT_CORE, *packages)
    assert ran.returncode == 0, ran.stderr
    assert {"jaxdeploy.models.families.llama", "pallas_kernels.paged_attention.reference"} <= set(ran.stdout.split())


def test_the_guard_on_core_imports_guards(tmp_path: Path) -> None:
    package = tmp_path / "pallas_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "careless.py").write_text("import yaml\n")
    ran = run_python("-c", IMPORT_CORE, "pallas_kernels", cwd=tmp_path)
    assert "pallas_kernels.careless imports yaml" in ran.stderr


def test_python_m_jaxdeploy_is_the_command() -> None:
    ran = run_python("-m", "jaxdeploy", "--help")
    assert ran.returncode == 0, ran.stderr
    assert "chat" in ran.stdout


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
