"""Compile for a GPU on a machine without one, and read what came out: launches, registers, spills, instructions.

Needs the packages of the ``gpu-compile`` extra (XLA's CUDA compiler, and CUDA's disassembler out of Triton's wheel) and
``JAX_PLATFORMS=cpu``. Use one process per kind of device: a compile that fails can leave the compiler unusable.
"""

from __future__ import annotations

from pallas_kernels.offline.devices import DEVICES, offline_mesh
from pallas_kernels.offline.program import Program, compile_for, compile_on_mesh, kernels_compiled_once
from pallas_kernels.offline.sass import KernelCode, disassemble

__all__ = [
    "DEVICES",
    "KernelCode",
    "Program",
    "compile_for",
    "compile_on_mesh",
    "disassemble",
    "kernels_compiled_once",
    "offline_mesh",
]
