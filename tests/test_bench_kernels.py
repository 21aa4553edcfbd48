"""The kernel benchmark: how it times, what it writes, how goals follow from its rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_kernels
import jax.numpy as jnp
import kernel_timing
import pytest
from kernel_goals import CUBLAS, DECODE_ROWS, LINEARS, goals, in_turn, torch_name, wanted
from kernel_timing import Op, Program, prepare, take_turns
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/bench_kernels.py"), *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def row(op: str, backend: str, us: float, copy_share: float = 0.5, **fields: Any) -> dict[str, Any]:
    return {"op": op, "backend": backend, "us": {"p50": us}, "copy_share": copy_share, "fields": fields}


ATTENTION: dict[str, Any] = {
    "sequences": 64,
    "queries": 1,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "block_size": 64,
    "rows": 1,
}
PREFILL: dict[str, Any] = {**ATTENTION, "sequences": 1, "queries": 32, "rows": 64, "contexts": [0], "kv": "bf16"}


def example() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and peers that just hold every goal."""
    rows, peers = [], []
    for k, n in LINEARS:
        for m in (*DECODE_ROWS, 4096):
            size = {"m": m, "k": k, "n": n}
            rows.append(row("w4a16_matmul", "pallas_triton", 10.0, 0.76, **size))
            rows.append(row("w4a16_matmul", "xla", 5.0, 0.1, **size))
            rows.append(row("w4a16_matmul", CUBLAS, 33.0 if m < 4096 else 9.0, **size))
            shape = f"{torch_name(k, n)} M={m} K={k} N={n}"
            peers.append({"name": "linear_int4_tinygemm", "shape": shape, "ms_median": 0.0101})
    for kv, us in (("bf16", 18.0), ("int8", 10.0)):
        rows.append(row("paged_attention", "pallas_triton", us, 0.81, **ATTENTION, contexts=(4095,), kv=kv))
    rows.append(row("paged_attention", "pallas_triton", 900.0, **PREFILL))
    rows.append(row("paged_attention", "pallas_triton", 100.0, **{**PREFILL, "queries": 128, "rows": 16}))
    peers.append({"name": "prefill_sdpa_flash", "shape": "S=2048 heads=32/8 d=128", "ms_median": 0.085})
    return rows, peers


def test_goals_that_hold() -> None:
    rows, peers = example()
    found = goals(rows, peers)
    assert {goal.verdict for goal in found} == {"held"}
    assert len(found) == 2 * (3 * 5 + 1) + 3
    values = {goal.name: goal.value for goal in found}
    assert values["w4a16_matmul M=16 K=14336 N=4096 vs jnp.dot bf16"] == pytest.approx(3.3)
    assert values["w4a16_matmul M=1 K=4096 N=14336 vs torch int4"] == pytest.approx(1.01)
    assert values["paged_attention batch 64 context 4096 int8 vs bf16"] == pytest.approx(1.8)
    assert values["paged_attention prefill 2048 tokens vs torch flash SDPA"] == pytest.approx(0.85)


def test_goals_that_are_missed() -> None:
    """All of ours take longer, except that int8 is compared with our own bf16."""
    rows, peers = example()
    for ours in rows:
        if ours["backend"] == "pallas_triton":
            slower = 1.2 if ours["fields"].get("kv") != "int8" else 1.4
            ours["us"]["p50"] *= slower
            ours["copy_share"] /= slower
    assert {goal.verdict for goal in goals(rows, peers)} == {"missed"}


def test_goals_without_measurements() -> None:
    rows, _ = example()
    assert {goal.verdict for goal in goals([], [])} == {"not measured"}
    refused = [{**{k: v for k, v in line.items() if k != "us"}, "refused": "no"} for line in rows]
    assert {goal.verdict for goal in goals(refused, [])} == {"not measured"}
    unmeasured = [goal.name for goal in goals(rows, []) if goal.value is None]
    assert unmeasured
    assert all("torch" in name for name in unmeasured)


def test_every_goal_has_its_shape() -> None:
    """What the goals need is among the real shapes of the ops."""
    fields = {name: [asdict(shape) for shape in Op(name).shapes.SHAPES] for name in ("w4a16_matmul", "paged_attention")}
    rows = [row(op, backend, 1.0, **f) for op in fields for f in fields[op] for backend in ("pallas_triton", CUBLAS)]
    unmeasured = [goal.name for goal in goals(rows, example()[1]) if goal.value is None]
    assert unmeasured == []
    assert sum(wanted(op, f) for op in fields for f in fields[op]) >= 15


def test_shapes_with_goals_come_first_then_something_of_everything() -> None:
    ops = {Op(name): Op(name).shapes.SHAPES for name in ("rms_norm", "paged_attention")}
    order = in_turn(ops)
    assert len(order) == sum(map(len, ops.values()))
    needed = [wanted(op.name, asdict(shape)) for op, shape in order]
    count = sum(needed)
    assert needed == [True] * count + [False] * (len(order) - count)
    assert {op.name for op, _ in order[count : count + 6]} == {"rms_norm", "paged_attention"}


def test_a_tiny_run_writes_one_form(tmp_path: Path) -> None:
    out = tmp_path / "results" / "kernels.json"
    flags = ("--tiny", "--ops", "rms_norm", "w8a8_matmul", "--shapes", "one token", "--rounds", "2")
    ran = bench(*flags, "--out", str(out), "--plot", str(tmp_path / "plot.png"))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert list(result)[:7] == ["schema", "git_sha", "device", "versions", "config", "metrics", "ratios"]
    assert result["metrics"]["truncated"] is False
    rows = result["metrics"]["rows"]
    names = [(line["op"], line["backend"]) for line in rows]
    assert names == [
        ("rms_norm", "pallas_triton"),
        ("rms_norm", "reference"),
        ("w8a8_matmul", "pallas_triton"),
        ("w8a8_matmul", "xla"),
        ("w8a8_matmul", CUBLAS),
    ]
    ceilings = result["metrics"]["ceilings"]
    for line in rows:
        assert 0 < line["us"]["min"] <= line["us"]["p50"] <= line["us"]["max"]
        assert line["copy_share"] == pytest.approx(line["gb_s"] * 1e9 / ceilings["copy_bytes_s"])
        assert line["flop_per_byte"] == pytest.approx(line["tflop_s"] * 1e12 / (line["gb_s"] * 1e9))
    assert rows[-1]["vs_jnp_dot"] == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "one token" in ran.stdout


@pytest.mark.slow
def test_a_spent_budget_is_marked(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    ran = bench("--tiny", "--ops", "rms_norm", "--rounds", "1", "--budget-s", "0", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    assert json.loads(out.read_text())["metrics"]["truncated"] is True
    assert "truncated" in ran.stdout


def test_real_shapes_need_a_gpu() -> None:
    ran = bench()
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "--tiny" in ran.stderr


def run_main(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_kernels", *flags])
    return bench_kernels.main()


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    metrics = {"ceilings": {"copy_bytes_s": 4e12, "matmul_flop_s": 8e14}, "rows": []}
    path = tmp_path / "kernels.json"
    result = {"metrics": metrics, "device": {"name": "H200"}, "versions": {"jax": "0.11.2"}, "git_sha": "0" * 40}
    path.write_text(json.dumps(result))
    assert run_main(monkeypatch, "--plot-from", str(path)) == 0
    assert path.with_suffix(".png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_main(monkeypatch, "--plot-from", str(path), "--plot", str(tmp_path / "second.png")) == 0
    assert not (tmp_path / "second.png").exists()
    assert "no plot: matplotlib is not installed here" in re.sub(r"\s+", " ", capsys.readouterr().out)


PEERS = """
import json, sys
LAYERS = {"qkv": (1, 2)}
def main():
    out = sys.argv[sys.argv.index("--out") + 1]
    metrics = [{"name": name, "shape": str(shape), "ms_median": 1.0} for name, shape in LAYERS.items()]
    json.dump({"metrics": metrics}, open(out, "w"))
    sys.exit(3)
"""


def peers(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--peers", str(folder), *flags])
    return bench_kernels.torch_peers(bench_kernels.parse_args(), Console())


def test_torch_peers_time_the_linears_of_the_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when they ran out of time (exit status 3), what they wrote counts."""
    (tmp_path / "peers_kernels.py").write_text(PEERS)
    found = peers(tmp_path, monkeypatch)
    assert [line["shape"] for line in found] == ["(1, 2)", *(str(linear) for linear in LINEARS)]
    assert [line["name"] for line in peers(tmp_path, monkeypatch, "--tiny")] == ["qkv"]


def test_torch_peers_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "peers_kernels.py").write_text("import a_module_that_is_missing")
    assert peers(tmp_path, monkeypatch) == []
    assert "torch's peers did not run: ModuleNotFoundError" in capsys.readouterr().out


def test_a_backend_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--tiny", "--rounds", "1"])
    run = bench_kernels.Bench(bench_kernels.parse_args(), [], Console(), 0.0)
    run.ceilings = {"copy_bytes_s": 1e9, "matmul_flop_s": 1e9}
    op = Op("w8a8_matmul")
    shape = op.shapes.Shape("K no multiple of 32", 1, 40, 16)
    triton, xla, _ = run.measure(op, shape)
    assert triton["refused"].startswith("w8a8_matmul: pallas_triton needs K")
    assert xla["us"]["p50"] > 0
    assert "error" in run.attempt(op, op.shapes.Shape("no rows", -1, 32, 16))[0]


def test_each_call_of_a_program_has_its_own_arrays() -> None:
    op = Op("rms_norm")
    arguments = op.arguments(op.shapes.TEST_SHAPES[0], 3)
    assert len({float(call.x.sum()) for (call,) in arguments}) == 3
    results = Program(lambda call: call.x.sum(), arguments).run()
    assert [float(result) for result in results] == [float(call.x.sum()) for (call,) in arguments]


def test_a_carried_program_goes_on_from_where_it_was() -> None:
    shared = [(jnp.zeros(2), jnp.ones(2))]
    programs = [Program(jnp.add, shared, lambda args, out: (out, args[1])) for _ in range(2)]
    for program in (*programs, programs[0]):
        program.run()
    assert shared[0][0].tolist() == [3, 3]
    assert programs[1].first()[0].tolist() == [4, 4]


def test_programs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))  # type: ignore[func-returns-value]

    programs = {}
    for name in "ab":
        programs[name] = Program(jnp.sin, [(jnp.ones(2),)])
        monkeypatch.setattr(programs[name], "sample", sampler(name))
    assert take_turns(programs, 2) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]


def test_samples_are_per_call() -> None:
    """A program of four calls that takes long enough is started once; a short one many times."""
    clock = iter([0.0, 0.5, 0.5, 8.5, 0.0, kernel_timing.SAMPLE_SECONDS / 10, 1.0, 3.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernel_timing.time.perf_counter", lambda: next(clock))
        assert Program(jnp.sin, [(jnp.ones(2),)] * 4).sample() == 8.0 / 4
        assert Program(jnp.sin, [(jnp.ones(2),)] * 4).sample() == pytest.approx(2.0 / (10 * 4))


def test_errors_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no")

    one = [(jnp.ones(2),)]
    programs = {"good": Program(jnp.sin, one), "compile": Program(broken, one), "run": Program(jnp.cos, one)}
    monkeypatch.setattr(programs["run"], "run", broken)
    failed = prepare(programs, 2)
    assert list(failed) == ["compile", "run"]
    assert {str(error) for error in failed.values()} == {"no"}


def test_calls_outgrow_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_timing.calls(1) == 2
    monkeypatch.setattr(kernel_timing, "on_gpu", lambda: True)
    assert kernel_timing.calls(1) == kernel_timing.MAX_CALLS
    assert kernel_timing.calls(10**10) == 2
    assert kernel_timing.calls(30_000_000) * 30_000_000 > kernel_timing.CACHE_BYTES
