#!/usr/bin/env python
"""Finds the fastest tiles of every kernel on this GPU, for the shapes of real models.

For each shape and Pallas backend that this device can run, all candidates are compiled, compared with the
fallback backend, and timed once; the fastest few then take turns. What wins is written to
pallas_kernels/tuning/<device>/<op>.json after every shape, tiles of a backend that has a kind of its own to the table
that it names; a later run carries on.

    python scripts/tune_kernels.py
    python scripts/tune_kernels.py --ops w4a16_matmul --backends pallas_mosaic_gpu
    python scripts/tune_kernels.py --ops w4a16_matmul --shapes 'Llama-3-8B' --budget-s 300 --again
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from bench_record import device, versions
from kernel_goals import in_turn
from kernel_timing import Op, Program, on_gpu, prepare, take_turns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxdeploy.files.atomic import put_text
from pallas_kernels import tuning
from pallas_kernels.dispatch import OPS, NoBackendError, RefusalError
from pallas_kernels.numerics import unit_roundoff
from pallas_kernels.target import current_target

BACKENDS = ("pallas_mosaic_gpu", "pallas_triton")
SCHEMA = "tiles/1"
FINALISTS = 4
COMPILE_THREADS = min(16, os.cpu_count() or 1)

ROUNDOFFS = 4
"""Roundoffs of its dtype that a result may be off, as a norm: it and what it is compared with each round their operands
and their result, half of the time by half as much.
"""


class Task(NamedTuple):
    """A shape to find tiles for.

    Attributes:
        op: what is called.
        shape: of the op's ``SHAPES``.
        backend: one of the op's. Where its module has ``TABLE`` and ``candidates_for``, they count instead of the op's.
    """

    op: Op
    shape: Any
    backend: str = "pallas_triton"

    def __str__(self) -> str:
        return f"{self.op.name} {self.backend}"

    @property
    def module(self) -> ModuleType:
        """The backend."""
        return importlib.import_module(self.op.package.BACKENDS[self.backend])

    @property
    def table(self) -> str:
        """The name of the table."""
        return str(getattr(self.module, "TABLE", self.op.name))

    @property
    def key(self) -> str:
        """The name of the call in it."""
        return str(self.op.shapes.key_for(self.shape))

    def candidates(self) -> list[Any]:
        """The tiles to time; none where the backend does not do the call."""
        return list(getattr(self.module, "candidates_for", self.op.shapes.candidates_for)(self.shape))

    def program(self, arguments: list[tuple[Any, ...]], tiles: Any) -> Program:
        """The call with ``tiles``, once for each of ``arguments``."""
        return Program(self.op.function(self.backend, tiles=tiles), arguments, self.op.carry)


def main() -> int:
    """Tune; exit status 2 where there is no GPU to tune for."""
    args, console = parse_args(), Console(width=160)
    if not on_gpu() and not args.dry_run:
        print("tune_kernels needs a GPU; --dry-run lists what it would time", file=sys.stderr)
        return 2
    tasks = list(find_tasks(args))
    if args.dry_run:
        return dry_run(tasks, console)
    started, done = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("tuning", total=len(tasks))
        for task in tasks:
            if time.monotonic() - started > args.budget_s:
                break
            progress.update(bar, description=str(task))
            progress.console.print(tune(task, args.rounds, args.folder))
            done += 1
            progress.advance(bar)
    state = "" if done == len(tasks) else "; the budget is spent, start again to carry on"
    console.print(f"{done} of {len(tasks)} shapes tuned in {time.monotonic() - started:.0f} s{state}")
    return 0


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="default: all")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    parser.add_argument("--shapes", type=re.compile, default=re.compile(""), help="regular expression that a shape has")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each of the fastest (default: 7)")
    parser.add_argument("--budget-s", type=float, default=1500, help="start no shape after this long (default: 1500)")
    parser.add_argument("--again", action="store_true", help="tune what is in the table, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be timed, and check a candidate of each op"
    )
    parser.add_argument("--folder", type=Path, default=tuning.FOLDER, help="where the tables are")
    return parser.parse_args()


def find_tasks(args: argparse.Namespace) -> Iterator[Task]:
    """What the flags ask for and the tables lack, each key once."""
    seen = set()
    for op, shape in in_turn({op: op.shapes.SHAPES for op in map(Op, args.ops)}):
        if not args.shapes.search(str(shape)):
            continue
        for backend in (name for name in op.package.BACKENDS if name in args.backends):
            task = Task(op, shape, backend)
            known = {} if args.again else read_table(table_path(args.folder, task.table))
            place = (task.table, task.key)
            if task.key not in known and place not in seen and runs(task.module) and task.candidates():
                seen.add(place)
                yield task


def runs(backend: ModuleType) -> bool:
    """Whether this device can run it. Without a GPU every one is listed, for the dry run to interpret."""
    try:
        backend.check_device(current_target())
    except RefusalError:
        return not on_gpu()
    return True


def tune(task: Task, rounds: int, folder: Path) -> str:
    """Find the fastest correct tiles of a shape and write them; a line that says what came out."""
    op, shape = task.op, task.shape
    arguments = op.arguments(shape)
    start = copied(arguments[0])
    truth = expected(op, start)
    candidates = task.candidates()
    programs = {str(index): task.program(arguments, tiles) for index, tiles in enumerate(candidates)}
    failed = prepare(programs, COMPILE_THREADS)
    correct = {}
    for name in programs.keys() - failed.keys():
        arguments[0] = copied(start)  # a program with a carry leaves others behind
        if agrees(programs[name].first(), truth):
            correct[name] = programs[name]
    wrong = len(candidates) - len(failed) - len(correct)
    counts = f"{len(candidates)} candidates, {len(failed)} failed, {wrong} wrong"
    if not correct:
        return f"{task} {task.key}: nothing to choose from: {counts}"
    first = take_turns(correct, 1)
    fastest = sorted(correct, key=lambda name: first[name][0])[:FINALISTS]
    seconds = {name: median(found) for name, found in take_turns({n: correct[n] for n in fastest}, rounds).items()}
    best = min(seconds, key=lambda name: seconds[name])
    tiles = candidates[int(best)]
    write_tiles(table_path(folder, task.table), task.key, asdict(tiles))
    return f"{task} {task.key}: {seconds[best] * 1e6:.1f} µs with {tiles} ({counts})"


def expected(op: Op, arguments: tuple[Any, ...]) -> Any:
    """What the op's fallback gives, XLA where there is one; ``arguments`` are left as they are."""
    name = "xla" if "xla" in op.package.BACKENDS else "reference"
    return Program(op.function(name), [copied(arguments)], op.carry).first()


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays of their own."""
    copies: tuple[Any, ...] = jax.tree.map(jnp.copy, arguments)
    return copies


def agrees(result: Any, truth: Any) -> bool:
    """Whether each array of ``result`` is as close to that of ``truth``, as a norm, as their roundings allow."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(truth), strict=True)
    return all(bool(_close(a, b)) for a, b in pairs)


@jax.jit
def _close(a: jax.Array, b: jax.Array) -> jax.Array:
    allowed = ROUNDOFFS * unit_roundoff(b.dtype if jnp.issubdtype(b.dtype, jnp.floating) else jnp.bfloat16)
    wide, true = a.astype(jnp.float32), b.astype(jnp.float32)
    near: jax.Array = jnp.linalg.norm((wide - true).ravel()) <= allowed * jnp.linalg.norm(true.ravel())
    return near


def table_path(folder: Path, table: str) -> Path:
    """Where a table for this device is kept, under ``folder``."""
    return folder / tuning.table_path(table, current_target().kind).relative_to(tuning.FOLDER)


def read_table(path: Path) -> dict[str, Any]:
    """The tiles that are known: key → fields."""
    tiles: dict[str, Any] = json.loads(path.read_text("utf-8"))["tiles"] if path.exists() else {}
    return tiles


def write_tiles(path: Path, key: str, fields: dict[str, Any]) -> None:
    """Add one entry to a table: the file is whole at any time."""
    tiles = dict(sorted({**read_table(path), key: fields}.items()))
    table = {"schema": SCHEMA, "device": device(), "versions": versions(), "tiles": tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    put_text(path, json.dumps(table, indent=2) + "\n")


def dry_run(tasks: list[Task], console: Console) -> int:
    """List the tasks; check a candidate of each backend in use. Exit status 1 where one is wrong."""
    for task in tasks:
        count = len(task.candidates())
        console.print(f"{task} {task.shape}: {count} candidates for '{task.key}'", highlight=False)
    verdicts = [check_one(op, backend) for op, backend in dict.fromkeys((task.op, task.backend) for task in tasks)]
    for text, _ in verdicts:
        console.print(text, highlight=False)
    return int(not all(right for _, right in verdicts))


def check_one(op: Op, backend: str) -> tuple[str, bool]:
    """Run the first candidate of the first test shape that has one: a line about it, and whether all is well."""
    tests = (Task(op, shape, backend) for shape in op.shapes.TEST_SHAPES)
    task, tiles = next((task, candidate) for task in tests for candidate in task.candidates())
    arguments = op.arguments(task.shape, 1)
    truth = expected(op, arguments[0])
    try:
        right = agrees(task.program(arguments, tiles).first(), truth)
    except NoBackendError as refusal:
        return f"{refusal}", True
    return f"{task} with {tiles} is {'right' if right else 'WRONG'}", right


if __name__ == "__main__":
    raise SystemExit(main())
