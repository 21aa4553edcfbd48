"""A function compiled for a GPU that is not there, and what its program consists of."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, SingleDeviceSharding

from pallas_kernels.offline.devices import DEVICES, offline_devices
from pallas_kernels.offline.sass import Kernels

_INDENT = 4
"""Spaces before what is inside an entry of XLA's listing, for each level."""

_GROUPS = ("kCommandBuffer", "kAsyncStart", "kAsyncDone", "kSequential", "kWhile", "kConditional")
"""Entries that hold, or wait for, others, and put no work on the device themselves."""

_MOSAIC = "mosaic"
"""Folder for what Mosaic GPU writes, within that of XLA."""

_kernel_cache: ContextVar[Path | None] = ContextVar("_kernel_cache", default=None)


@dataclass(frozen=True)
class Launch:
    """One entry of the program's sequence; ``depth`` 0 is the top level, 1 is inside a CUDA graph or a loop."""

    kind: str
    name: str
    depth: int
    grid: tuple[int, ...]
    threads: int
    smem_bytes: int

    @property
    def on_device(self) -> bool:
        """Whether it is a kernel, a copy or a collective, rather than a group of such."""
        return self.kind not in _GROUPS


class Program:
    """The compiled function: ``launches``, memory, and ``kernels`` by name, as XLA's emitters and Pallas made them."""

    def __init__(self, compiled: jax.stages.Compiled, device: str, dump: Path) -> None:
        self.compiled, self.device = compiled, device
        texts = sorted(dump.glob("*.thunk_sequence_after_thunk_passes.txt")) or sorted(
            dump.glob("*.thunk_sequence.txt")
        )
        self.launches = [launch for path in texts for launch in _read_launches(path.read_text("utf-8"))]
        sources = (path.read_text("utf-8") for path in sorted(dump.glob("**/*.ptx")))
        self.kernels = Kernels(sources, DEVICES[device].arch)
        mosaic = (_read_mosaic_launch(path) for path in sorted((dump / _MOSAIC).glob("*.ll")))
        self._mosaic_launches = {launch.name: launch for launch in mosaic}
        self.hlo: str = compiled.as_text() or ""

    @property
    def memory(self) -> Any:
        """XLA's ``CompiledMemoryStats``: temp, argument, output and alias sizes in bytes."""
        return self.compiled.memory_analysis()

    def launched(self, name: str) -> Launch:
        """The first launch of kernel ``name`` (grid, threads, shared memory)."""
        if name in self._mosaic_launches:
            return self._mosaic_launches[name]
        return next(launch for launch in self.launches if launch.name == name)

    @property
    def on_device(self) -> int:
        """Launches that put work on the device; those of a loop count once."""
        return sum(launch.on_device for launch in self.launches)

    @property
    def outside_command_buffers(self) -> int:
        """Those of them at the top level, in no CUDA graph."""
        return sum(launch.on_device and launch.depth == 0 for launch in self.launches)

    @property
    def command_buffers(self) -> int:
        """CUDA graphs at the top level."""
        return sum(launch.kind == "kCommandBuffer" and launch.depth == 0 for launch in self.launches)

    def copies(self, shape: str) -> int:
        """How often the program copies an array of this HLO shape, e.g. ``bf16[64,2,8,64,128]``."""
        return len(re.findall(rf"= {re.escape(shape)}\S* (?:copy|copy-start)\(", self.hlo))


def compile_for(
    device: str, function: Callable[..., Any], *args: Any, donate: Sequence[int] = (), options: Any = None
) -> Program:
    """Compile ``function`` for one GPU of ``DEVICES``; ``args`` are arrays or ``ShapeDtypeStruct`` trees."""
    target = offline_devices(device)[0]
    place = SingleDeviceSharding(target)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    abstract = AbstractDevice(device_kind=target.device_kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=abstract)
    with ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        stack.enter_context(jax.default_device(target))
        lowered = jax.jit(function, donate_argnums=tuple(donate)).trace(*placed).lower(lowering_platforms=("cuda",))
    return _compile(lowered, device, options)


def compile_on_mesh(
    device: str, mesh: Mesh, function: Callable[..., Any], *args: Any, donate: Sequence[int] = (), options: Any = None
) -> Program:
    """Compile ``function`` for a mesh of ``offline_mesh``; every leaf of ``args`` carries its sharding."""
    with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
        lowered = jax.jit(function, donate_argnums=tuple(donate)).trace(*args).lower(lowering_platforms=("cuda",))
    return _compile(lowered, device, options)


@contextmanager
def kernels_compiled_once() -> Iterator[None]:
    """Within it, a kernel is compiled for the first program that has it, and for one kind of device.

    It then stands in the ``kernels`` of that program only, and may be launched by another name. For those who look at
    launches and memory, and wait less.
    """
    with tempfile.TemporaryDirectory() as folder:
        token = _kernel_cache.set(Path(folder, "kernels"))
        try:
            yield
        finally:
            _kernel_cache.reset(token)


def _compile(lowered: Any, device: str, options: Any) -> Program:
    with tempfile.TemporaryDirectory() as folder, _mosaic_dumps(Path(folder, _MOSAIC)):
        wanted: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "ptx"}
        if cache := _kernel_cache.get():
            wanted["xla_gpu_kernel_cache_file"] = str(cache)
            if jax.__version_info__ < (0, 11):  # or it has no such cache; later ones always compile kernels in parallel
                wanted["xla_gpu_enable_llvm_module_compilation_parallelism"] = True
        compiled = lowered.compile(compiler_options={**wanted, **(options or {})})
        return Program(compiled, device, Path(folder))


@contextmanager
def _mosaic_dumps(folder: Path) -> Iterator[None]:
    """Have Mosaic GPU write what it makes of a kernel to ``folder``: to XLA its kernels are calls into the unknown."""
    folder.mkdir()
    wanted = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
    before = {name: os.environ.pop(name, None) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _read_mosaic_launch(path: Path) -> Launch:
    """From the host's side of a kernel, in LLVM's language."""
    call = re.search(r"@mosaic_gpu_launch_kernel\(ptr [^,]*((?:, i32 \d+){10})", path.read_text("utf-8"))
    if call is None:
        raise ValueError(f"{path.name} launches no kernel")
    x, y, z, _, _, _, *threads, smem_bytes = (int(number) for number in re.findall(r"i32 (\d+)", call[1]))
    name = re.sub(r"_\d+$", "_mosaic_gpu_kernel", path.stem)
    return Launch("kCustomCall", name, 0, (x, y, z), prod(threads), smem_bytes)


def _read_launches(text: str) -> list[Launch]:
    pattern = re.compile(
        r"^( *)\d+: (k\w+)[ \t]*\[[^\]]*\][ \t]*(\S*)(?:.*?grid: \[([\d, ]+)\])?(?:.*?threads: \[(\d+))?"
        r"(?:.*?shared_memory: (\d+))?",
        re.MULTILINE,
    )
    found = []
    for match in pattern.finditer(text):
        grid = tuple(int(size) for size in (match[4] or "0").split(","))
        depth = len(match[1]) // _INDENT
        found.append(Launch(match[2], match[3], depth, grid, int(match[5] or 0), int(match[6] or 0)))
    return found
