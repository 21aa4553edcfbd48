"""The scripts, where they must refuse; what they do when all is well is what CI does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdeploy.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / name), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def fake_python(folder: Path, refused: str) -> str:
    """An interpreter like this one that cannot do what contains ``refused``."""
    path = folder / "python3"
    path.write_text(f'#!/bin/sh\ncase "$2" in *"{refused}"*) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["chat", "test"])
@pytest.mark.parametrize(
    ("refused", "told"),
    [("import ensurepip", "apt install python3-venv"), ("version_info", "3.11"), ("", "install Python 3.11")],
)
def test_unfit_python_gets_one_line(script: str, refused: str, told: str, tmp_path: Path) -> None:
    python = fake_python(tmp_path, refused)
    ran = run_script(script, PYTHON=python, JAXDEPLOY_VENV=str(tmp_path / "venv"))
    assert ran.returncode != 0
    assert told in ran.stderr
    assert (ran.stdout, ran.stderr.count("\n")) == ("", 1)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "keep").touch()
    ran = run_script("chat", JAXDEPLOY_VENV=str(tmp_path))
    assert ran.returncode != 0
    assert "is no virtual environment" in ran.stderr
    assert (tmp_path / "keep").exists()


def test_unknown_argument_of_the_test_script() -> None:
    ran = run_script("test", "--fast")
    assert ran.returncode != 0
    assert "unknown argument --fast" in ran.stderr


def test_gpu_suite_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-smi"
    path.write_text("#!/bin/sh\nexit 9\n")
    path.chmod(0o755)
    ran = run_script("gpu_suite", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ran.returncode != 0
    assert ran.stderr == "scripts/gpu_suite needs an NVIDIA GPU, and nvidia-smi shows none here\n"


def test_gpu_suite_runs_numerics_then_the_benchmark(tmp_path: Path) -> None:
    """With an interpreter that only says what it was asked, and a GPU that is none."""
    for name, text in (
        ("nvidia-smi", "echo 580.1"),
        ("python", 'echo "$@"; case "$*" in *test_rms_norm*) exit 1; esac'),
    ):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAXDEPLOY_PYTHON": str(tmp_path / "python")}
    out = tmp_path / "out"
    ran = run_script("gpu_suite", "--out", str(out), "--peers", "/peers", **environment)
    assert "-m pytest -q -m gpu tests/test_paged_attention_triton.py" in ran.stdout
    assert (out / "test_w4a16_matmul.log").read_text() == "-m pytest -q -m gpu tests/test_w4a16_matmul.py\n"
    assert "=== numerics: FAILED" in ran.stdout
    assert re.search(rf"scripts/bench_kernels.py --budget-s \d+ --out {out}/kernels_\S+ .* --peers /peers", ran.stdout)
    assert ran.returncode == 1, "what failed first is not forgotten"


def test_gpu_suite_end_to_end(tmp_path: Path) -> None:
    """With the same; a benchmark that fails keeps none of the others from running."""
    for name, text in (("nvidia-smi", "echo 580.1"), ("python", 'echo "$@"; case "$*" in *bench_gen*) exit 1; esac')):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAXDEPLOY_PYTHON": str(tmp_path / "python")}
    out = tmp_path / "out"
    ran = run_script("gpu_suite", "--end-to-end", "--out", str(out), "--peers", "/peers", **environment)
    asked = [line for line in ran.stdout.splitlines() if not line.startswith("===")]
    assert [line.split()[0] for line in asked] == [
        "scripts/bench_generation.py",
        "scripts/bench_throughput.py",
        "/peers/peers_transformers.py",
        "scripts/bench_throughput.py",
        "scripts/end_to_end_goals.py",
    ]
    assert ran.returncode == 1


def test_gpu_suite_features(tmp_path: Path) -> None:
    for name, text in (("nvidia-smi", "echo 580.1"), ("python", 'echo "$@"')):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAXDEPLOY_PYTHON": str(tmp_path / "python")}
    ran = run_script("gpu_suite", "--features", "--out", str(tmp_path / "out"), **environment)
    asked = [line for line in ran.stdout.splitlines() if not line.startswith("===")]
    assert [line.split()[0] for line in asked] == [
        "scripts/bench_speculation.py",
        "scripts/bench_adapters.py",
        "scripts/end_to_end_goals.py",
    ]
    assert ran.returncode == 0


def test_end_to_end_goals() -> None:
    """From files of the form that the benchmarks write; what was not measured is said to be so."""
    from end_to_end_goals import FILES, goals

    assert {goal.verdict for goal in goals({name: {} for name in FILES})} == {"not measured"}
    rate, share = "decode_tok_s 1x(128,256)", "weights of copy bandwidth 1x(128,256)"
    bf16 = "jaxdeploy llama-8b"
    metrics = {
        "jaxdeploy": {rate: {"p50": 500.0}, "share_of_ceilings": {share: 0.7}},
        bf16: {rate: {"p50": 200.0}, "share_of_ceilings": {share: 0.8}},
    }
    peers = [{"name": "decode_static_compiled", "tok_s": 250.0}, {"name": "continuous_batching", "tok_s": None}]
    ours = {"jaxdeploy": {"output_tok_s": {"p50": 9000.0}}}
    found = goals(
        {
            "generation": {"metrics": metrics, "ratios": {f"{rate} vs {bf16}": 2.5}},
            "throughput": {"metrics": {**ours, "kv_tokens": 1000}},
            "throughput_int8": {"metrics": {**ours, "kv_tokens": 1940}},
            "peers": {"metrics": peers},
            "speculation": {"ratios": {"copy tok_s, on / off": 1.9, "draft tok_s, on / off": 0.94}},
            "adapters": {"ratios": {"adapters / base": 0.9}},
        }
    )
    assert [(goal.value, goal.verdict) for goal in found] == [
        (2.5, "held"),
        (0.7, "held"),
        (0.8, "held"),
        (2.0, "missed"),
        (None, "not measured"),
        (1.94, "held"),
        (1.9, "held"),
        (0.94, "missed"),
        (0.9, "held"),
    ]


@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda13"), ("570.12", "cuda12"), ("N/A", "")])
def test_the_cuda_extra_follows_the_driver(driver: str, extra: str, tmp_path: Path) -> None:
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
    path.chmod(0o755)
    command = ["bash", "-c", f"source {ROOT}/scripts/venv.sh && cuda_extra"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.check_output(command, env=environment, text=True).strip() == extra


def test_result_files_have_one_form(tmp_path: Path) -> None:
    from bench_record import write_result

    path = tmp_path / "results" / "one.json"
    written = write_result(path, "example/1", {"batch": 8}, {"decode_tok_s": 10.0}, {"decode_vs_peer": 2.5})
    assert list(written) == ["schema", "git_sha", "device", "versions", "config", "metrics", "ratios"]
    assert written["device"]["type"] == "cpu"
    assert '"decode_vs_peer": 2.5' in path.read_text()


def test_a_ratio_must_be_a_number(tmp_path: Path) -> None:
    from bench_record import write_result

    with pytest.raises(ConfigError, match="must be a finite number"):
        write_result(tmp_path / "x.json", "example/1", {}, {}, {"speedup": float("nan")})


@pytest.mark.parametrize(
    "name",
    ["write_cli_docs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bench_structured", "make_goldens"))],
)
def test_help_runs_nothing(name: str) -> None:
    """Also where the packages of their extras are missing."""
    page = ROOT / "docs/cli.md"
    before = page.stat().st_mtime_ns
    code = (
        "import runpy, sys; sys.modules.update(torch=None, jsonschema=None); sys.argv = [sys.argv[1], '--help']; "
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "scripts" / f"{name}.py")
    ran = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("usage: ")
    assert page.stat().st_mtime_ns == before
