"""Straight-line PTX on arrays of registers: what inline assembly computes, on a machine without a GPU."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

Array = np.ndarray[Any, Any]


def execute(asm: str, operands: list[Array], dtype: str) -> Array:
    """Run ``asm``: ``operands`` are uint32 arrays for $1, $2 …, the result is $0. Floats are pairs of ``dtype``."""
    registers = {f"${index}": word for index, word in enumerate(operands, 1)}

    def value(text: str) -> Array:
        return registers[text] if text in registers else np.full_like(operands[0], int(text, 0))

    for line in filter(None, (line.strip(" {}\n") for line in asm.split(";"))):
        opcode, target, *texts = re.split(r"[\s,]+", line)
        if opcode != ".reg":
            registers[target] = instruction(opcode, [value(text) for text in texts], dtype)
    return registers["$0"]


def instruction(opcode: str, words: list[Array], dtype: str) -> Array:
    """One PTX instruction, as CUDA's PTX ISA describes it."""
    match opcode, words:
        case "mov.b32", [a]:
            return a
        case "or.b32", [a, b]:
            return a | b
        case "shr.u32", [a, b]:
            return a >> b
        case "prmt.b32", [a, b, selector]:
            pool = [word >> np.uint32(8 * place) & np.uint32(255) for word in (a, b) for place in range(4)]
            picks = [int(selector[0]) >> 4 * place & 7 for place in range(4)]
            return gathered([pool[pick] << np.uint32(8 * place) for place, pick in enumerate(picks)])
        case "lop3.b32", [a, b, c, table]:
            cases = [(x, y, z) for x in (~a, a) for y in (~b, b) for z in (~c, c)]
            chosen = [x & y & z for index, (x, y, z) in enumerate(cases) if int(table[0]) >> index & 1]
            return gathered(chosen)
        case "fma.rn.bf16x2" | "fma.rn.f16x2", [a, b, c]:
            assert (opcode == "fma.rn.f16x2") == (dtype == "float16")
            exact = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
            low, high = exact.astype(jnp.dtype(dtype)).view(np.uint16).astype(np.uint32)
            return np.asarray(low | high << np.uint32(16))
    raise NotImplementedError(opcode)


def gathered(words: list[Array]) -> Array:
    return functools.reduce(np.bitwise_or, words)


def halves(words: Array, dtype: str) -> Array:
    """The two floats of each word: float64 [2, ...], the low one first."""
    both = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)])
    return both.astype(np.uint16).view(jnp.dtype(dtype)).astype(np.float64)
