"""What is read out of a program that was compiled for a GPU: its launches and its machine code."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pallas_kernels.offline import KernelCode, disassemble, sass
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.offline.program import _read_mosaic_launch
from pallas_kernels.offline.sass import MachineCode, _instructions

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
    code = MachineCode(tuple(_instructions(LISTING)))
    assert [opcode for _, opcode, _ in code.code][:3] == ["LDC", "S2R", "LDG.E.128"]
    assert code.loops() == [["LDG.E.128", "HMMA.16816.F32.BF16", "BRA"]], "a branch to itself ends the listing, no loop"
    assert code.hot_loop() == code.loops()[0]


def test_a_kernel_without_a_loop() -> None:
    assert MachineCode(tuple(_instructions(LISTING.split("@P1")[0]))).hot_loop() == []


WAITING = """
        /*0000*/                   MOV R0, RZ ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0020*/              @!P0 BRA 0xa0 ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR8], R24 ;
        /*0040*/                   BSSY B0, 0x70 ;
        /*0050*/               @P1 BSYNC B0 ;
        /*0060*/                   BSYNC B0 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/               @P3 BRA 0x0 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*00b0*/              @!P0 BRA 0xa0 ;
        /*00c0*/                   BRA 0x30 ;
"""


def test_a_branch_back_from_the_end_of_a_kernel_is_no_loop() -> None:
    """Around the loop over chunks is one over tiles; a wait that fails is repeated after the end, and part of both."""
    code = MachineCode(tuple(_instructions(WAITING)))
    assert sorted(map(len, code.loops())) == [2, 10, 12]


def test_the_hot_loop_may_hold_loops_that_wait() -> None:
    work = "".join(f"        /*{16 * at:04x}*/   FADD R0, R0, R1 ;\n" for at in range(20))
    wait = "        /*0140*/   SYNCS.PHASECHK P0, [UR4] ;\n        /*0150*/   @!P0 BRA 0x140 ;\n"
    code = MachineCode(tuple(_instructions(work + wait + "        /*0160*/   @P1 BRA 0x0 ;\n")))
    assert len(code.hot_loop()) == 23


def _cubin(code: bytes) -> bytes:
    """An ELF file with sections of data, of ``code``, and of nothing."""
    sections = [(1, 2, b"data"), (1, 6, code), (0, 0, b"")]
    content = b"".join(data for *_, data in sections)
    places = [64 + sum(len(data) for *_, data in sections[:at]) for at in range(len(sections))]
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF", 2, 190, 1, 0, 0, 64 + len(content), 0, 64, 0, 0, 64, 3, 0)
    table = [
        struct.pack("<IIQQQQIIQQ", 0, kind, flags, 0, at, len(data), 0, 0, 0, 0)
        for at, (kind, flags, data) in zip(places, sections, strict=True)
    ]
    return header + content + b"".join(table)


def test_kernels_are_disassembled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def nvdisasm(*command: str) -> str:
        runs.append(command[1:-1])
        code = Path(command[-1]).read_bytes()
        return "".join(f"        /*{at:04x}*/   OP{code[at]} R0 ;\n" for at in range(0, len(code), 16))

    monkeypatch.setattr(sass, "_tool", str)
    monkeypatch.setattr(sass, "_run", nvdisasm)
    sizes = (2, 3, 1)
    kernels = [KernelCode(f"k{size}", "sm_90a", 8, 0, 0, _cubin(bytes([size]) * 16 * size)) for size in sizes]
    found = disassemble(kernels)
    assert [[opcode for _, opcode, _ in code.code] for code in found] == [[f"OP{size}"] * size for size in sizes]
    assert runs == [("--binary", "SM90a")]
    assert kernels[1].machine_code.code[0] == (0, "OP3", "R0")
    assert disassemble([]) == []
    with pytest.raises(ValueError, match="arch="):
        disassemble([kernels[0], KernelCode("k", "sm_80", 8, 0, 0, b"")])


def test_what_mosaic_launches(tmp_path: Path) -> None:
    path = tmp_path / "paged_attention_0.ll"
    path.write_text(
        "declare i32 @mosaic_gpu_launch_kernel(ptr, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, ptr, ptr)\n"
        "%309 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 8, i32 4, i32 16, i32 0, i32 0, i32 0, "
        "i32 384, i32 1, i32 1, i32 165968, i32 0, ptr %1, ptr %300)\n"
    )
    launch = _read_mosaic_launch(path)
    assert launch.name == "paged_attention_mosaic_gpu_kernel"
    assert (launch.grid, launch.threads, launch.smem_bytes) == ((8, 4, 16), 384, 165968)


@pytest.mark.parametrize(
    ("name", "arch"), [("a100", "sm_80"), ("rtx4090", "sm_89"), ("h200", "sm_90a"), ("b200", "sm_100a")]
)
def test_architectures(name: str, arch: str) -> None:
    assert DEVICES[name].arch == arch
