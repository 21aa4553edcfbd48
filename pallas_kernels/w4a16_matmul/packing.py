"""Weights from integers, AWQ and GPTQ into the layout that the kernels read, and back. On the host, in numpy.

The layout is described in ``pallas_kernels.w4a16_matmul.layout``. Weights are [K, N]: K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.w4a16_matmul.layout import CHUNK, GROUP_SIZES, PER_WORD, WORD_ROWS

Array = np.ndarray[Any, Any]

_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of an AWQ word holds each of eight neighbouring columns."""


def pack(q: Array, scales: Array, zeros: Array, group_size: int) -> Array:
    """Pack a weight ``(q - zero) · scale``.

    Args:
        q: unsigned integers [K, N], 0…15.
        scales: [K / g, N], finite in float16.
        zeros: integers [K / g, N], 0…16; all 8 for symmetric weights.
        group_size: g, rows that share a scale: 32, 64, a multiple of 128, or −1 for all K.

    Returns:
        int32 [K / 128, 16 + 128 / g, N]; groups of more than 128 rows are stored as several of 128.

    Raises:
        ValueError: shapes, group size or values that the layout cannot express.
    """
    k, n = q.shape
    rows = k if group_size == -1 else group_size
    if k % CHUNK:
        raise ValueError(f"K={k} must be a multiple of {CHUNK}; pad q, and the activations with zeros")
    if rows <= 0 or (rows not in GROUP_SIZES and rows % CHUNK) or k % rows:
        raise ValueError(f"group_size={group_size} must be 32, 64, -1 or a multiple of 128 that divides K={k}")
    if scales.shape != (k // rows, n) or zeros.shape != scales.shape:
        raise ValueError(f"scales {scales.shape} and zeros {zeros.shape} must both be [K / g, N] = {(k // rows, n)}")
    _in_range("q", q, 15)
    _in_range("zeros", zeros, 16)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("scales must be finite in float16; they are stored in it")
    nibbles = q.reshape(-1, PER_WORD, WORD_ROWS, n)
    words = np.zeros((k // CHUNK, WORD_ROWS, n), np.uint32)
    for j in range(PER_WORD):
        words |= nibbles[:, j].astype(np.uint32) << np.uint32(4 * j)
    meta = halves.view(np.uint16).astype(np.uint32) | zeros.astype(np.uint32) << np.uint32(16)
    meta = np.repeat(meta, max(1, rows // CHUNK), axis=0).reshape(k // CHUNK, -1, n)
    return np.concatenate([words, meta], axis=1).view(np.int32)


def unpack(packed: Array) -> tuple[Array, Array, Array]:
    """The inverse: int32 [K / 128, 16 + 128 / g, N] → q uint8 [K, N], scales float16 and zeros uint8 [K / g, N]."""
    n = packed.shape[2]
    words, meta = np.split(packed.view(np.uint32), [WORD_ROWS], axis=1)
    q = _nibbles(words, axis=1)
    scales = meta.astype(np.uint16).view(np.float16)
    zeros = (meta >> np.uint32(16)).astype(np.uint8)
    return q.reshape(-1, n), scales.reshape(-1, n), zeros.reshape(-1, n)


def from_awq(qweight: Array, qzeros: Array, scales: Array) -> Array:
    """Pack what AutoAWQ's "gemm" version stores.

    Args:
        qweight: int32 [K, N / 8]; a word holds columns 0, 2, 4, 6, 1, 3, 5, 7 of eight, from its lowest nibble up.
        qzeros: int32 [K / g, N / 8], in the same order.
        scales: [K / g, N].

    Raises:
        ValueError: see ``pack``.
    """
    q, zeros = (_nibbles(words, order=_AWQ_NIBBLES).reshape(len(words), -1) for words in (qweight, qzeros))
    return pack(q, scales, zeros, _rows_per_group(q, scales))


def from_gptq(
    qweight: Array, qzeros: Array, scales: Array, g_idx: Array | None = None, *, zero_offset: int = 1
) -> tuple[Array, Array | None]:
    """Pack what AutoGPTQ and GPTQModel store.

    With act-order, groups are made of scattered rows. They are gathered here, and the activations must then come in the
    same order: ``x[:, order]``, or for good, by reordering the columns of the weight that produces ``x``.

    Args:
        qweight: int32 [K / 8, N]; a word holds eight neighbouring rows, from its lowest nibble up.
        qzeros: int32 [K / g, N / 8]; a word holds eight neighbouring columns.
        scales: [K / g, N].
        g_idx: the group of each row, [K]; ``None`` where rows are in order.
        zero_offset: what is added to the stored zero points: 1 for format "gptq", 0 for "gptq_v2".

    Returns:
        The packed weight, and ``order`` int32 [K] or ``None`` where rows are in order.

    Raises:
        ValueError: groups of different sizes; and see ``pack``.
    """
    n = qweight.shape[1]
    q = _nibbles(qweight, axis=1).reshape(-1, n)
    zeros = _nibbles(qzeros).reshape(len(qzeros), -1) + np.uint8(zero_offset)
    rows = _rows_per_group(q, scales)
    if g_idx is None:
        return pack(q, scales, zeros, rows), None
    order, places = np.argsort(g_idx, kind="stable").astype(np.int32), np.arange(len(q))
    if g_idx.shape != places.shape or not np.array_equal(g_idx[order], places // rows):
        raise ValueError(f"g_idx must give {rows} of the {len(q)} rows to each of the {len(scales)} groups")
    return pack(q[order], scales, zeros, rows), None if np.array_equal(order, places) else order


def _nibbles(words: Array, axis: int = -1, order: Sequence[int] = range(PER_WORD)) -> Array:
    """The eight of each 32-bit word in ``order``, 0 the lowest: uint8 along a new ``axis``."""
    shifted = (words.view(np.uint32) >> np.uint32(4 * i) for i in order)
    return np.stack([(word & np.uint32(15)).astype(np.uint8) for word in shifted], axis=axis)


def _rows_per_group(q: Array, scales: Array) -> int:
    if len(scales) == 0 or len(q) % len(scales):
        raise ValueError(f"scales {scales.shape} must have a row for each group of the {len(q)} rows of the weight")
    return len(q) // len(scales)


def _in_range(name: str, values: Array, maximum: int) -> None:
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= maximum:
        raise ValueError(f"{name} must lie in 0…{maximum}, have {values.min()}…{values.max()}")
