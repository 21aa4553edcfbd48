"""Compile every kernel, and a whole decode step, for GPUs that are not here; check the machine code against its bars.

``scripts/check_gpu_compile`` sets up what this needs. One process per kind of device: a compile that fails can leave
the compiler unusable. Results go to ``benchmarks/results/static/``, one file per device, version of jax, and step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_record import ROOT, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

FOLDER = ROOT / "benchmarks/results/static"
DEVICES = ("a100", "rtx4090", "h200", "b200")
STEPS = {"1": "Llama-3-8B on one GPU", "8": "Llama-3-8B on eight GPUs"}
"""Tensor-parallel sizes of the decode step, compiled for an H200."""

INSTRUCTIONS = {
    ("w4a16_matmul", "decode", None): 3.2,
    ("paged_attention", "decode", "bf16"): 3.3,
    ("paged_attention", "decode", "int8"): 7.0,
}
"""Most instructions per element, on an H200 for shapes with ``bar``: (op, phase, kv) → limit."""

LAUNCHES_PER_LAYER = {1: 7, 8: 13}
STEP_TEMP_BYTES = 16 * 10**6
STEP_BATCH = 8


@dataclass(frozen=True)
class Entry:
    """One compilation: a backend of an op at one of the op's shapes."""

    op: str
    backend: str
    shape: Any

    @property
    def phase(self) -> str | None:
        """``decode``, ``prefill``, or nothing where the op knows no such difference."""
        return getattr(self.shape, "phase", None)

    @property
    def kv(self) -> str | None:
        """What the KV pool holds, for attention."""
        return getattr(self.shape, "kv", None)


def entries(device: str) -> Iterator[Entry]:
    """What is compiled for ``device``: one shape of each phase and pool; on an H200 all that have a bar besides."""
    from pallas_kernels.dispatch import OPS

    for op in OPS:
        backends = importlib.import_module(f"pallas_kernels.{op}").BACKENDS
        shapes = importlib.import_module(f"pallas_kernels.{op}.shapes").SHAPES
        for backend in (name for name in backends if name.startswith("pallas_")):
            seen = set()
            for shape in shapes:
                entry = Entry(op, backend, shape)
                kind = (entry.phase, entry.kv)
                if kind not in seen or (device == "h200" and shape.bar):
                    yield entry
                seen.add(kind)


def measure(entry: Entry, device: str) -> dict[str, Any]:
    """Compile ``entry`` and describe its main kernel; ``refused`` holds the reason where the backend does not do it."""
    import jax

    from pallas_kernels.dispatch import NoBackendError
    from pallas_kernels.offline import compile_for

    op = getattr(importlib.import_module(f"pallas_kernels.{entry.op}"), entry.op)
    shapes = importlib.import_module(f"pallas_kernels.{entry.op}.shapes")
    options: dict[str, Any] = {}

    def arrays() -> Any:
        args, keywords = shapes.make_args(entry.shape)
        options.update(keywords)
        return args

    args = jax.eval_shape(arrays)
    found: dict[str, Any] = {
        "op": entry.op,
        "backend": entry.backend,
        "phase": entry.phase,
        "kv": entry.kv,
        "shape": str(entry.shape),
        "bar": bool(entry.shape.bar),
        "device": device,
    }
    try:
        program = compile_for(device, partial(op, backend=entry.backend, **options), *args)
    except NoBackendError as refusal:
        return {**found, "refused": str(refusal)}
    kernels = [code for name, code in program.kernels.items() if name.startswith(entry.op)]
    main = max(kernels, key=lambda code: len(code.hot_loop()))
    launch = program.launched(main.name)
    trip = len(main.hot_loop())
    per_trip = shapes.elements_per_trip(entry.shape, shapes.tiles_for(entry.shape, device))
    return {
        **found,
        "kernel": main.name,
        "registers": main.registers,
        "spills": sum(code.spills for code in kernels),
        "smem_bytes": launch.smem_bytes + main.static_smem,
        "threads": launch.threads,
        "ctas": math.prod(launch.grid),
        "instructions_per_element": round(trip * launch.threads / per_trip, 3) if trip else None,
        "temp_bytes": program.memory.temp_size_in_bytes,
        "argument_bytes": program.memory.argument_size_in_bytes,
    }


def measure_step(tp: int) -> dict[str, Any]:
    """Compile the decode step of a Llama-3-8B in W4A16 for ``tp`` H200 and count what it launches."""
    import jax

    from pallas_kernels.decode_layer import step

    compiled = step.compile_llama_8b("h200", batch=STEP_BATCH, tp=tp)
    program = compiled.program
    graphs = [launch for launch in program.launches if launch.kind == "kCommandBuffer" and launch.depth == 0]
    return {
        "jax": jax.__version__,
        "tp": tp,
        "batch": STEP_BATCH,
        "layers": compiled.layers,
        "launches_per_layer": round(compiled.launches_per_layer, 2),
        "command_buffers": len(graphs),
        "outside_command_buffers": sum(launch.on_device and launch.depth == 0 for launch in program.launches),
        "temp_bytes": program.memory.temp_size_in_bytes,
        "alias_bytes": program.memory.alias_size_in_bytes,
        "pool_copies": compiled.pool_copies,
        "weight_copies": compiled.weight_copies,
    }


def failures(kernels: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    """What breaks a bar, one line each."""
    lines = []
    for kernel in kernels:
        name = f"{kernel['op']} {kernel['backend']} {kernel['shape']} on {kernel['device']}"
        if "error" in kernel:
            lines.append(f"{name}: {kernel['error']}")
        elif "refused" not in kernel:
            lines += [f"{name}: {fault}" for fault in _kernel_faults(kernel)]
    for step in steps:
        lines += [f"decode step, tp={step['tp']}, jax {step['jax']}: {fault}" for fault in _step_faults(step)]
    return lines


def _kernel_faults(kernel: dict[str, Any]) -> Iterator[str]:
    if kernel["spills"]:
        yield f"{kernel['spills']} bytes of registers spilled; the bar is 0"
    if kernel["op"] == "w4a16_matmul" and kernel["temp_bytes"] > kernel["argument_bytes"] / 2:
        yield f"{kernel['temp_bytes']} bytes of temporaries beside {kernel['argument_bytes']} of arguments"
    limit = INSTRUCTIONS.get((kernel["op"], kernel["phase"], kernel["kv"]))
    held = kernel["bar"] and kernel["device"] == "h200"
    if held and limit is not None and not (kernel["instructions_per_element"] or math.inf) <= limit:
        yield f"{kernel['instructions_per_element']} instructions per element; the bar is {limit}"


def _step_faults(step: dict[str, Any]) -> Iterator[str]:
    limit = LAUNCHES_PER_LAYER[step["tp"]]
    if step["launches_per_layer"] > limit:
        yield f"{step['launches_per_layer']} launches a layer; the bar is {limit}"
    if step["tp"] == 1 and step["command_buffers"] != 1:
        yield f"{step['command_buffers']} top-level CUDA graphs; the bar is 1"
    if step["tp"] == 1 and step["outside_command_buffers"]:
        yield f"{step['outside_command_buffers']} launches outside the CUDA graph; the bar is 0"
    if step["temp_bytes"] > STEP_TEMP_BYTES:
        yield f"{step['temp_bytes']} bytes of temporaries; the bar is {STEP_TEMP_BYTES}"
    for what in ("pool_copies", "weight_copies"):
        if step[what]:
            yield f"{step[what]} {what.replace('_', ' ')}; the bar is 0"


def work(task: str, out: Path) -> None:
    """What a subprocess does: measure one device or one step; a kernel that fails takes no other along."""
    if task in STEPS:
        out.write_text(json.dumps(measure_step(int(task))))
        return
    found = []
    for entry in entries(task):
        try:
            found.append(measure(entry, task))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found.append(
                {"op": entry.op, "backend": entry.backend, "shape": str(entry.shape), "device": task, "error": reason}
            )
        out.write_text(json.dumps(found))


def run_task(task: str, folder: Path) -> tuple[str, Any]:
    """Run ``work`` in a process of its own; what it wrote, and its last words where it died."""
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
    """One file per device with its kernels, and one per decode step."""
    import jax

    for task, found in results.items():
        if task in STEPS:
            name, tables = f"decode_step-h200-tp{task}", {"kernels": [], "decode_step": found}
        else:
            name, tables = f"kernels-{task}", {"kernels": found}
        config = {"compiled_for": "h200" if task in STEPS else task, "jax": jax.__version__, "bars": _bars()}
        metrics = {"seconds": round(seconds, 1)}
        write_result(folder / f"{name}-jax{jax.__version__}.json", "static/1", config, metrics, {}, tables=tables)


def _bars() -> dict[str, Any]:
    return {
        "instructions_per_element": {"/".join(filter(None, key)): limit for key, limit in INSTRUCTIONS.items()},
        "launches_per_layer": {f"tp{tp}": limit for tp, limit in LAUNCHES_PER_LAYER.items()},
        "step_temp_bytes": STEP_TEMP_BYTES,
    }


def show(kernels: list[dict[str, Any]], steps: list[dict[str, Any]], console: Console) -> None:
    """The figures as tables."""
    table = Table("device", "op", "backend", "shape", "kv", "registers", "spills", "shared memory", "instr / element")
    for kernel in kernels:
        where = [kernel["device"], kernel["op"], kernel["backend"], kernel["shape"], kernel.get("kv") or ""]
        if note := kernel.get("error") or kernel.get("refused"):
            table.add_row(*where, note)
        else:
            figures = (kernel["registers"], kernel["spills"], kernel["smem_bytes"], kernel["instructions_per_element"])
            table.add_row(*where, *map(str, figures), style="bold" if kernel["bar"] else "")
    console.print(table)
    for step in steps:
        console.print("decode step: " + ", ".join(f"{name} {value}" for name, value in step.items()))


def main() -> int:
    """Exit status 1 when a bar is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", nargs="*", default=list(DEVICES), choices=DEVICES)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS, help="tensor-parallel sizes")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON files")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--work-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.work_out)
        return 0
    console, start = Console(width=200), time.monotonic()
    tasks = [*args.steps, *sorted(args.devices, key=lambda name: name != "h200")]  # the longest first
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool, Progress(console=console) as progress:
        bar = progress.add_task("compiling", total=len(tasks))
        for task, found in pool.map(partial(run_task, folder=Path(folder)), tasks):
            results[task] = found
            progress.advance(bar)
    write(results, args.out, time.monotonic() - start)
    kernels = [kernel for task, found in results.items() if task not in STEPS for kernel in found]
    steps = [found for task, found in results.items() if task in STEPS]
    show(kernels, steps, console)
    broken = failures(kernels, steps)
    for line in broken:
        console.print(f"BROKEN {line}", style="red")
    held = "every bar holds" if not broken else f"{len(broken)} broken"
    console.print(f"{len(kernels)} kernels, {len(steps)} steps in {time.monotonic() - start:.0f} s: {held}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
