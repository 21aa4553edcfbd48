"""What is read out of a program that was compiled for a GPU: its launches and its machine code."""

from __future__ import annotations

import pytest

from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.offline.sass import KernelCode, _instructions

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                      /* 0x0000000000007919 */
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0000000402048981 */
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;    /* 0x000000060408723c */
        /*0040*/               @P1 BRA 0x20 ;                              /* 0xfffffffc00fc1947 */
        /*0050*/                   EXIT ;                                  /* 0x000000000000794d */
        /*0060*/                   BRA 0x60 ;                              /* 0xfffffffc00fc7947 */
"""


def test_instructions_and_loops() -> None:
    code = KernelCode("k", 32, 0, 0, tuple(_instructions(LISTING)))
    assert [opcode for _, opcode, _ in code.code][:3] == ["LDC", "S2R", "LDG.E.128"]
    assert code.loops() == [["LDG.E.128", "HMMA.16816.F32.BF16", "BRA"]], "a branch to itself ends the listing, no loop"
    assert code.hot_loop() == code.loops()[0]


def test_a_kernel_without_a_loop() -> None:
    assert KernelCode("k", 8, 0, 0, tuple(_instructions(LISTING.split("@P1")[0]))).hot_loop() == []


@pytest.mark.parametrize(
    ("name", "arch"), [("a100", "sm_80"), ("rtx4090", "sm_89"), ("h200", "sm_90a"), ("b200", "sm_100a")]
)
def test_architectures(name: str, arch: str) -> None:
    assert DEVICES[name].arch == arch
