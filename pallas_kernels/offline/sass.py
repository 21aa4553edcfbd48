"""The machine code of a kernel: PTX assembled by ``ptxas``, read back by ``cuobjdump``."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


class ToolMissingError(Exception):
    """A program of the CUDA toolkit is not installed."""


@dataclass(frozen=True)
class KernelCode:
    """One kernel. ``spills`` is bytes stored to and loaded from local memory; ``code`` is (address, opcode, operands)."""

    name: str
    registers: int
    spills: int
    static_smem: int
    code: tuple[tuple[int, str, str], ...]

    def loops(self) -> list[list[str]]:
        """The opcodes of each loop: what lies between a backward branch and its target."""
        found = []
        for address, opcode, operands in self.code:
            target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
            if target and int(target[1], 16) < address:
                start = int(target[1], 16)
                found.append([op for at, op, _ in self.code if start <= at <= address])
        return found

    def hot_loop(self) -> list[str]:
        """The opcodes of the longest loop that holds no other long one; empty where there is no loop."""
        loops = self.loops()
        return max(loops, key=len) if loops else []


def assemble(ptx: str, arch: str) -> KernelCode:
    """Assemble the PTX of one kernel. Raises ``ToolMissingError``, or ``RuntimeError`` with ptxas's words."""
    match = re.search(r"\.entry\s+([\w$]+)", ptx)
    if match is None:
        raise ValueError("the PTX has no .entry: it is not a kernel")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        report = _run(_tool("ptxas"), "-v", f"-arch={arch}", str(source), "-o", str(cubin))
        listing = _run(_tool("cuobjdump"), "-sass", str(cubin))
    return KernelCode(
        name=match[1],
        registers=_number(r"Used (\d+) registers", report),
        spills=_number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
        static_smem=_number(r"(\d+) bytes smem", report),
        code=tuple(_instructions(listing)),
    )


def _instructions(listing: str) -> Iterator[tuple[int, str, str]]:
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
    for match in pattern.finditer(listing):
        yield int(match[1], 16), match[2], match[3]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


@cache
def _tool(name: str) -> str:
    """Triton's wheel carries the toolkit's programs; the newest ``ptxas`` there is called ``ptxas-blackwell``."""
    names = {"ptxas": ("ptxas-blackwell", "ptxas")}.get(name, (name,))
    package = find_spec("triton")
    folder = Path(package.origin).parent / "backends/nvidia/bin" if package and package.origin else None
    for candidate in names:
        if folder and (folder / candidate).exists():
            return str(folder / candidate)
    for candidate in names:
        if path := shutil.which(candidate):
            return path
    raise ToolMissingError(f"{name} is not here; install triton, which carries it: pip install triton")
