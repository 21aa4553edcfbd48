#!/usr/bin/env python
"""Speed of every kernel on the shapes of real models, against this device's ceilings and against peers, in one run.

Needs a GPU; with --tiny it runs anywhere, to see that it runs. Each backend that works here takes its turn, the
reference only where the op has no XLA backend, or when it is named.

    python scripts/bench_kernels.py --out benchmarks/results/kernels_h200.json --plot docs/images/roofline_h200.png
    python scripts/bench_kernels.py --ops w4a16_matmul --shapes 'Llama-3-8B.* M=1 ' --rounds 9
    python scripts/bench_kernels.py --plot-from benchmarks/results/kernels_h200.json --plot roofline.png
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import jax.numpy as jnp
import roofline
from bench_record import picture_path, result_path, write_result
from kernel_goals import CUBLAS, LINEARS, goals, in_turn, torch_name
from kernel_timing import Op, Program, calls, ceilings, on_gpu, prepare, take_turns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pallas_kernels.dispatch import OPS, NoBackendError
from pallas_kernels.target import current_target

MATMULS = ("w4a16_matmul", "w8a8_matmul")
"""Ops that a plain bf16 product stands beside."""

COMPILE_THREADS = min(8, os.cpu_count() or 1)
TINY_SHAPES = 2
SCHEMA = "kernels/1"

# Adds the goals' linears to those that the torch peers time.
_PEERS = """
import sys; sys.path.insert(0, sys.argv.pop(1))
import peers_kernels as peers
peers.LAYERS.update({layers})
peers.main()
"""


def main() -> int:
    """Run the benchmark; exit status 2 where it cannot."""
    args, console = parse_args(), Console(width=180)
    if args.plot_from:
        plot(json.loads(args.plot_from.read_text()), args.plot or args.plot_from.with_suffix(".png"), console)
        return 0
    started = time.monotonic()
    peers = torch_peers(args, console) if args.peers else []
    if not on_gpu() and not args.tiny:
        print(
            "bench_kernels needs a GPU; --tiny runs small shapes anywhere, --plot-from draws a result", file=sys.stderr
        )
        return 2
    result = Bench(args, peers, console, started).run()
    report(result, console)
    if args.plot:
        plot(result, args.plot, console)
    return 0


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="default: all")
    parser.add_argument(
        "--shapes", type=re.compile, default=re.compile(""), help="regular expression that a shape contains"
    )
    parser.add_argument("--backends", nargs="+", help="names of backends, 'reference' among them; default: see above")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each backend, in turn (default: 5)")
    parser.add_argument(
        "--budget-s", type=float, default=480, help="start no shape after this many seconds (default: 480)"
    )
    parser.add_argument("--peers", type=Path, help="folder with peers_kernels.py (torch), or the JSON that it wrote")
    parser.add_argument(
        "--tiny", action="store_true", help="a few small shapes of each op; Pallas interpreted without a GPU"
    )
    parser.add_argument("--out", type=result_path, help="JSON file to write, after every shape")
    parser.add_argument("--plot", type=picture_path, help="roofline plot to write")
    parser.add_argument("--plot-from", type=Path, help="measure nothing, draw this result")
    return parser.parse_args()


class Bench:
    """One run: what was measured so far, and when it began."""

    def __init__(self, args: argparse.Namespace, peers: list[dict[str, Any]], console: Console, started: float) -> None:
        self.args, self.peers, self.console, self.started = args, peers, console, started
        self.rows: list[dict[str, Any]] = []
        self.ceilings: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Measure the ceilings, then every shape; the result as it is written."""
        tasks = in_turn({Op(name): self.shapes(Op(name)) for name in self.args.ops})
        sizes: dict[str, Any] = {"nbytes": 2**20, "side": 128} if self.args.tiny else {}
        self.ceilings = ceilings(self.args.rounds, **sizes)
        done = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("timing", total=len(tasks))
            for op, shape in tasks:
                if time.monotonic() - self.started > self.args.budget_s:
                    break
                progress.update(bar, description=op.name)
                self.rows += self.attempt(op, shape)
                done += 1
                progress.advance(bar)
                self.record(truncated=done < len(tasks))
        return self.record(truncated=done < len(tasks))

    def shapes(self, op: Op) -> list[Any]:
        """The op's shapes that the flags ask for."""
        found = op.shapes.TEST_SHAPES[:TINY_SHAPES] if self.args.tiny else op.shapes.SHAPES
        return [shape for shape in found if self.args.shapes.search(str(shape))]

    def backends(self, op: Op) -> list[str]:
        """The op's backends to time, in its order of preference."""
        names: Sequence[str] = list(op.package.BACKENDS)
        if self.args.backends:
            return [name for name in names if name in self.args.backends]
        return [name for name in names if name != "reference" or "xla" not in names]

    def attempt(self, op: Op, shape: Any) -> list[dict[str, Any]]:
        """``measure``; where a shape as a whole fails, for want of memory say, the others are still measured."""
        try:
            return self.measure(op, shape)
        except Exception as error:
            return [{**describe(op, shape), "backend": "all", "error": first_line(error)}]

    def measure(self, op: Op, shape: Any) -> list[dict[str, Any]]:
        """A row for each backend, and for the plain product beside a matrix product."""
        arguments = op.arguments(shape)
        programs = {name: Program(op.function(name), arguments, op.carry) for name in self.backends(op)}
        if op.name in MATMULS:
            programs[CUBLAS] = cublas(shape)
        failed = prepare(programs, COMPILE_THREADS)
        works = {name: program for name, program in programs.items() if name not in failed}
        samples = take_turns(works, self.args.rounds)
        rows = []
        for name in programs:
            row = {**describe(op, shape), "backend": name}
            if name in failed:
                kind = "refused" if isinstance(failed[name], NoBackendError) else "error"
                rows.append({**row, kind: first_line(failed[name])})
            else:
                nbytes, flops = cublas_cost(shape) if name == CUBLAS else op.shapes.cost(shape)
                rows.append({**row, **self.figures(samples[name], nbytes, flops), "calls": len(arguments)})
                if CUBLAS in samples:
                    rows[-1]["vs_jnp_dot"] = median(samples[CUBLAS]) / median(samples[name])
        return rows

    def figures(self, seconds: Sequence[float], nbytes: int, flops: int) -> dict[str, Any]:
        """Rates and shares of the ceilings, of the median call."""
        typical = median(seconds)
        return {
            "us": {name: round(f(seconds) * 1e6, 3) for name, f in (("p50", median), ("min", min), ("max", max))},
            "gb_s": nbytes / typical / 1e9,
            "tflop_s": flops / typical / 1e12,
            "flop_per_byte": flops / nbytes,
            "copy_share": nbytes / typical / self.ceilings["copy_bytes_s"],
            "matmul_share": flops / typical / self.ceilings["matmul_flop_s"],
        }

    def record(self, truncated: bool) -> dict[str, Any]:
        """The result; written, too, where ``--out`` says so."""
        found = goals(self.rows, self.peers)
        config = {name: getattr(self.args, name) for name in ("ops", "backends", "rounds", "budget_s", "tiny")}
        return write_result(
            self.args.out or os.devnull,
            SCHEMA,
            {**config, "shapes": self.args.shapes.pattern},
            {
                "ceilings": self.ceilings,
                "rows": self.rows,
                "torch_peers": self.peers,
                "seconds": round(time.monotonic() - self.started, 1),
                "truncated": truncated,
            },
            {goal.name: goal.value for goal in found if goal.value is not None},
            tables={"goals": [{**asdict(goal), "verdict": goal.verdict} for goal in found]},
        )


def cublas(shape: Any) -> Program:
    """bf16 [M, K] · [K, N] by cuBLAS; by whatever XLA has where there is no GPU."""
    import jax

    def make(seed: Any) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.key(seed))
        sizes = ((shape.m, shape.k), (shape.k, shape.n))
        first, second = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True))
        return first, second

    made = jax.jit(make)
    arguments = [made(seed) for seed in range(calls(cublas_cost(shape)[0]))]
    return Program(jnp.dot, arguments, options={"xla_gpu_enable_triton_gemm": False} if on_gpu() else None)


def cublas_cost(shape: Any) -> tuple[int, int]:
    """(bytes, floating-point operations) of that product."""
    m, k, n = shape.m, shape.k, shape.n
    return 2 * (m * k + k * n + m * n), 2 * m * k * n


def describe(op: Op, shape: Any) -> dict[str, Any]:
    """What a row says of its shape."""
    return {"op": op.name, "phase": shape.phase, "shape": str(shape), "fields": asdict(shape)}


def first_line(error: Exception) -> str:
    """An error in a line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def torch_peers(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """What torch's peers measure here: run before JAX takes the device's memory. Nothing where they cannot run."""
    if args.peers.suffix == ".json":
        return read_peers(args.peers)
    layers = {torch_name(k, n): (k, n) for k, n in LINEARS}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "peers.json")
        flags = ["--only", "int4,attention", "--out", str(out)]
        flags += ["--device", "cpu", "--tiny"] if args.tiny else ["--budget-s", str(args.budget_s / 4)]
        script = _PEERS.format(layers=layers if not args.tiny else {})
        command = [sys.executable, "-c", script, str(args.peers), *flags]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.exists():
            reason = (ran.stderr.strip() or f"exit status {ran.returncode}").splitlines()[-1]
            console.print(f"torch's peers did not run: {reason}", style="yellow")
            return []
        return read_peers(out)


def read_peers(path: Path) -> list[dict[str, Any]]:
    """The measurements in a JSON of the torch peers."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["metrics"]
    return found


def report(result: Mapping[str, Any], console: Console) -> None:
    """Print what was measured, and the goals."""
    metrics = result["metrics"]
    top = metrics["ceilings"]
    table = Table("op", "shape", "backend", title=f"{result['device']['name']}, {current_target()}")
    for heading in ("µs", "GB/s", "TFLOP/s", "% copy", "% matmul", "vs jnp.dot"):
        table.add_column(heading, justify="right")
    previous = None
    for row in sorted(metrics["rows"], key=lambda row: str(row["op"])):
        where = (row["op"], row["shape"])
        cells = [*(where if where != previous else ("", "")), row["backend"]]
        previous = where
        if "us" not in row:
            table.add_row(*cells, row.get("refused") or f"error: {row['error']}", style="dim")
            continue
        shares = (f"{100 * row[name]:.0f}" for name in ("copy_share", "matmul_share"))
        rates = (f"{row['us']['p50']:.1f}", f"{row['gb_s']:.0f}", f"{row['tflop_s']:.3g}")
        table.add_row(*cells, *rates, *shares, f"{row['vs_jnp_dot']:.2f}" if "vs_jnp_dot" in row else "")
    console.print(table)
    console.print(f"copy {top['copy_bytes_s'] / 1e9:.0f} GB/s, bf16 matmul {top['matmul_flop_s'] / 1e12:.3g} TFLOP/s")
    summary = Table("goal", "at least", "is", "verdict")
    for goal in result["goals"]:
        if goal["value"] is not None:
            summary.add_row(goal["name"], f"{goal['bar']:.2f}", f"{goal['value']:.2f}", goal["verdict"])
    if summary.row_count:
        console.print(summary)
    missing = sum(goal["value"] is None for goal in result["goals"])
    state = "truncated: the budget is spent; " if metrics["truncated"] else ""
    console.print(f"{state}{missing} of {len(result['goals'])} goals not measured; {metrics['seconds']} s")


def plot(result: Mapping[str, Any], path: Path, console: Console) -> None:
    """Draw the roofline, or say in a line what is missing for it."""
    try:
        roofline.draw(result, path)
    except ImportError:
        console.print("no plot: matplotlib is not installed here; --plot-from draws it from the JSON elsewhere")


if __name__ == "__main__":
    raise SystemExit(main())
