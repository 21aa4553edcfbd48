"""The machine code of a kernel: PTX assembled by ``ptxas``, read back by ``nvdisasm``."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path


class ToolMissingError(Exception):
    """A program of the CUDA toolkit is not installed."""


@dataclass(frozen=True)
class MachineCode:
    """The instructions of a kernel: (address, opcode, operands). Its first need not have address 0."""

    code: tuple[tuple[int, str, str], ...]

    def loops(self) -> list[list[str]]:
        """The opcodes of each loop: all that lies on a way from its first instruction back to it."""
        return [[self.code[at][1] for at in sorted(body)] for body in self._loops]

    def hot_loop(self) -> list[str]:
        """The opcodes of the longest loop that holds no other but those that only wait; empty where there is none."""
        long = [body for body in self._loops if len(body) > _WAITING]
        inner = [body for body in self._loops if not any(other < body for other in long)]
        return [self.code[at][1] for at in sorted(max(inner, key=len, default=()))]

    @cached_property
    def _loops(self) -> list[frozenset[int]]:
        """The natural loops, as sets of positions in ``code``.

        A branch backwards closes one only if every way to it leads through its target: what is rare, such as a second
        try of a wait, stands at the end of a kernel and branches back into the middle.
        """
        after = _successors(self.code)
        before: dict[int, list[int]] = {}
        for at, following in after.items():
            for target in following:
                before.setdefault(target, []).append(at)
        closing: dict[int, list[int]] = {}
        for at, following in after.items():
            for head in following:
                if head < at and at not in _reachable(0, after, without=head):
                    closing.setdefault(head, []).append(at)
        return [
            frozenset({head}.union(*(_reachable(end, before, without=head) for end in ends)))
            for head, ends in closing.items()
        ]


@dataclass(frozen=True)
class KernelCode:
    """One kernel, assembled for ``arch`` to ``cubin``. ``spills`` is bytes to and from local memory."""

    name: str
    arch: str
    registers: int
    spills: int
    static_smem: int
    cubin: bytes = field(repr=False)

    @cached_property
    def machine_code(self) -> MachineCode:
        """Its instructions; of several kernels ``disassemble`` reads them sooner."""
        (code,) = disassemble([self])
        return code


def disassemble(kernels: Sequence[KernelCode]) -> list[MachineCode]:
    """What ``nvdisasm`` reads in ``kernels``, all of one ``arch``: in one run, since most of a run is its start.

    Raises ``ToolMissingError``, ``ValueError`` where they are of several architectures, or ``RuntimeError`` with
    nvdisasm's words.
    """
    archs = {kernel.arch for kernel in kernels}
    if not archs:
        return []
    if len(archs) > 1:
        raise ValueError(f"arch={sorted(archs)} are several; disassemble the kernels of one at a time")
    texts = [_code_section(kernel.cubin) for kernel in kernels]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(texts))
        file.flush()
        model = archs.pop().replace("sm_", "SM")
        listed = list(_instructions(_run(_tool("nvdisasm"), "--binary", model, file.name)))
    ends = list(accumulate(map(len, texts)))
    starts = [0, *ends[:-1]]
    addresses = [address for address, _, _ in listed]
    return [
        MachineCode(tuple(listed[bisect_left(addresses, start) : bisect_left(addresses, end)]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _code_section(cubin: bytes) -> bytes:
    """The one section of instructions in an ELF file of 64 bits (System V ABI, chapter 4)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + at * size) for at in range(count)]
    (code,) = (cubin[at : at + length] for _, _, flags, _, at, length in headers if flags & _EXECUTABLE)
    return code


_EXECUTABLE = 4
"""The flag SHF_EXECINSTR of an ELF section."""

_WAITING = 16
"""Instructions of the longest loop that does nothing but wait for a barrier."""


def _successors(code: Sequence[tuple[int, str, str]]) -> dict[int, list[int]]:
    """The positions of the instructions that may follow each."""
    place = {address: at for at, (address, _, _) in enumerate(code)}
    meeting: dict[str, str] = {}
    found = {}
    for at, (address, opcode, operands) in enumerate(code):
        base = opcode.split(".")[0]
        target = re.search(r"0x[0-9a-f]+$", operands)
        barrier = re.search(r"\bB\d+\b", operands)
        jumps = [int(target[0], 16)] if target and base in ("BRA", "BSSY", "WARPSYNC") else []
        if base == "BSSY" and barrier and target:
            meeting[barrier[0]] = target[0]
        if base == "BSYNC" and barrier and barrier[0] in meeting:
            jumps = [int(meeting[barrier[0]], 16)]
        leaves = base in ("BRA", "BSYNC", "EXIT", "RET") and not re.search(r"\bU?P\d\b", operands)
        passing = [] if leaves or at + 1 == len(code) else [at + 1]
        found[at] = [place[jump] for jump in jumps if jump in place and jump != address] + passing
    return found


def _reachable(start: int, edges: Mapping[int, Sequence[int]], *, without: int) -> set[int]:
    """Positions that ``edges`` lead to from ``start``, itself included, when ``without`` is no way to pass."""
    seen: set[int] = set()
    waiting = [start] if start != without else []
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            waiting += [target for target in edges.get(at, ()) if target != without]
    return seen


class Kernels(Mapping[str, KernelCode]):
    """Kernels by name, in the PTX texts ``sources`` of one each; each is assembled when it is first asked for.

    Texts of no kernel are passed over; of equal ones one stays. Asking raises ``ToolMissingError``, or ``RuntimeError``
    with ptxas's words.
    """

    def __init__(self, sources: Iterable[str], arch: str) -> None:
        entries = ((re.search(r"\.entry\s+([\w$]+)", text), text) for text in sources)
        self._sources, self._arch = {match[1]: text for match, text in entries if match}, arch

    def __getitem__(self, name: str) -> KernelCode:
        return _assemble(name, self._sources[name], self._arch)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@cache
def _assemble(name: str, ptx: str, arch: str) -> KernelCode:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        report = _run(_tool("ptxas"), "-v", f"-arch={arch}", str(source), "-o", str(cubin))
        return KernelCode(
            name=name,
            arch=arch,
            registers=_number(r"Used (\d+) registers", report),
            spills=_number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
            static_smem=_number(r"(\d+) bytes smem", report),
            cubin=cubin.read_bytes(),
        )


def _instructions(listing: str) -> Iterator[tuple[int, str, str]]:
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
    for match in pattern.finditer(listing):
        yield int(match[1], 16), match[3], f"{match[2] or ''}{match[4]}".strip()


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
