"""Compile every kernel, and a whole decode step, for GPUs that are not here; check the machine code against its bars.

``scripts/check_gpu_compile`` sets up what this needs. One process per kind of device: a compile that fails can leave
the compiler unusable. Results go to ``benchmarks/results/static/``, one file per device, version of jax, and step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench_record import ROOT, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from static_bars import bars, failures

FOLDER = ROOT / "benchmarks/results/static"
DEVICES = ("a100", "rtx4090", "h200", "b200")
STEPS = "steps"
"""Decode steps and the engine's own, compiled for an H200."""

TP = (1, 8)
"""Tensor-parallel sizes of the decode step."""


def work(task: str, out: Path) -> None:
    """What a subprocess does: measure the kernels for one device, or the steps; one that fails takes no other along."""
    from static_programs import Found, count_instructions, entries, measure, measure_engine, measure_step

    if task == STEPS:
        decode = {f"decode_step-h200-tp{tp}": {"decode_step": measure_step(tp)} for tp in TP}
        out.write_text(json.dumps({**decode, "engine-h200": {"engine_steps": measure_engine()}}))
        return
    found: list[Found] = []
    for entry in entries(task):
        try:
            found += measure(entry, task)
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            found.append(Found.nothing(entry, task, error=f"{type(error).__name__}: {first}"))
        out.write_text(json.dumps([kernel.figures for kernel in found]))
    count_instructions(found)
    out.write_text(json.dumps([kernel.figures for kernel in found]))


def run_task(task: str, folder: Path) -> tuple[str, Any]:
    """Run ``work`` in a process of its own; what it wrote. Exits with its last words where it died."""
    out = folder / f"{task}.json"
    command = [sys.executable, __file__, "--work", task, "--work-out", str(out)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    found = json.loads(out.read_text()) if out.exists() else []
    if ran.returncode:
        raise SystemExit(
            f"compiling for {task} died with {ran.returncode} after {len(found)} kernels: {ran.stderr[-2000:]}"
        )
    return task, found


def write(results: dict[str, Any], folder: Path, seconds: float) -> None:
    """One file per device with its kernels, and one per kind of step."""
    import jax

    steps = results.get(STEPS, {})
    kernels = {f"kernels-{device}": {"kernels": results[device]} for device in results if device != STEPS}
    for name, tables in {**kernels, **steps}.items():
        config = {"compiled_for": name.split("-")[1], "jax": jax.__version__, "bars": bars()}
        metrics, tables = {"seconds": round(seconds, 1)}, {"kernels": [], **tables}
        write_result(folder / f"{name}-jax{jax.__version__}.json", "static/1", config, metrics, {}, tables=tables)


def show(
    kernels: list[dict[str, Any]], steps: list[dict[str, Any]], engine: list[dict[str, Any]], console: Console
) -> None:
    """The figures as tables."""
    table = Table("device", "kernel", "shape", "registers", "spills", "shared memory", "instr / element", box=None)
    for kernel in kernels:
        if "error" in kernel:
            table.add_row(kernel["device"], f"{kernel['op']} {kernel['backend']}", kernel["shape"], kernel["error"])
        elif "refused" not in kernel:
            names = ("device", "kernel", "shape", "registers", "spills", "smem_bytes", "instructions_per_element")
            figures = ("" if kernel[name] is None else str(kernel[name]) for name in names)
            table.add_row(*figures, style="bold" if kernel["bar"] else "")
    console.print(table)
    for name, step in [("decode step", step) for step in steps] + [("engine", step) for step in engine]:
        console.print(f"{name}: " + ", ".join(f"{name} {value}" for name, value in step.items()))


def main() -> int:
    """Exit status 1 when a bar is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", nargs="*", default=list(DEVICES), choices=DEVICES)
    parser.add_argument("--no-steps", action="store_true", help="kernels only")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON files")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--work-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        from pallas_kernels.offline import kernels_compiled_once

        with kernels_compiled_once():
            work(args.work, args.work_out)
        return 0
    console, start = Console(width=200), time.monotonic()
    steps_task = [] if args.no_steps else [STEPS]
    tasks = [*steps_task, *sorted(args.devices, key=lambda name: name != "h200")]  # the longest first
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool, Progress(console=console) as progress:
        bar = progress.add_task("compiling", total=len(tasks))
        for task, found in pool.map(partial(run_task, folder=Path(folder)), tasks):
            results[task] = found
            progress.advance(bar)
    write(results, args.out, time.monotonic() - start)
    kernels = [kernel for task in results if task != STEPS for kernel in results[task]]
    tables = results.get(STEPS, {}).values()
    steps = [table["decode_step"] for table in tables if "decode_step" in table]
    engine = [step for table in tables for step in table.get("engine_steps", [])]
    show(kernels, steps, engine, console)
    broken = failures(kernels, steps, engine)
    for line in broken:
        console.print(f"BROKEN {line}", style="red")
    held = "every bar holds" if not broken else f"{len(broken)} broken"
    console.print(f"{len(kernels)} kernels, {len(steps)} steps in {time.monotonic() - start:.0f} s: {held}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
