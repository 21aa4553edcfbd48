"""Small unsigned integers in 32-bit words, the first in the lowest bits.

4 bits: eight to a word. 3 bits: 32 in three words, two of them lying across the border of two words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxdeploy.formats.quantized import Array


def words_for(count: int, bits: int) -> int:
    """How many words hold ``count`` integers. The last run may be filled up with zeros."""
    span, held = _run(bits)
    return -(-count // held) * span


def pack(values: Array, bits: int, axis: int, order: Sequence[int] | None = None) -> Array:
    """Pack along ``axis``, 0 or 1; the inverse of ``unpack``.

    Args:
        values: unsigned integers [A, B], at most 2^bits − 1.
        bits: of each.
        axis: along which neighbours share a word.
        order: for each place in a run of words, from the lowest up, which of the run's integers it holds.

    Returns:
        int32, with ``words_for`` words along ``axis``.

    Raises:
        ValueError: an integer needs more bits.
    """
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"values must lie in 0…{(1 << bits) - 1} to be packed in {bits} bits, have {values.max()}")
    span, held = _run(bits)
    runs = _split(_filled_up(values, axis, held), axis, held)
    words = np.zeros((*runs.shape[: axis + 1], span, *runs.shape[axis + 2 :]), np.uint32)
    source, target = np.moveaxis(runs, axis + 1, 0), np.moveaxis(words, axis + 1, 0)
    for place, (word, shift) in enumerate(_places(bits)):
        value = source[place if order is None else order[place]].astype(np.uint32)
        target[word] |= value << np.uint32(shift)
        if shift + bits > 32:
            target[word + 1] |= value >> np.uint32(32 - shift)
    return _joined(words, axis).view(np.int32)


def unpack(words: Array, bits: int, axis: int, order: Sequence[int] | None = None) -> Array:
    """Unpack along ``axis``, 0 or 1: 32-bit words [A, B] → uint8, as many as the words have room for."""
    span, held = _run(bits)
    runs = _split(np.ascontiguousarray(words, np.int32).view(np.uint32), axis, span)
    values = np.empty((*runs.shape[: axis + 1], held, *runs.shape[axis + 2 :]), np.uint8)
    source, target = np.moveaxis(runs, axis + 1, 0), np.moveaxis(values, axis + 1, 0)
    for place, (word, shift) in enumerate(_places(bits)):
        value = source[word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= source[word + 1] << np.uint32(32 - shift)
        target[place if order is None else order[place]] = value & np.uint32((1 << bits) - 1)
    return _joined(values, axis)


def _run(bits: int) -> tuple[int, int]:
    """The fewest words that hold whole integers, and how many these are."""
    span = bits // math.gcd(bits, 32)
    return span, 32 * span // bits


def _places(bits: int) -> Iterator[tuple[int, int]]:
    """Word and lowest bit of each integer of a run."""
    return (divmod(bits * i, 32) for i in range(_run(bits)[1]))


def _filled_up(values: Array, axis: int, held: int) -> Array:
    missing = -values.shape[axis] % held
    return np.pad(values, [(0, missing if i == axis else 0) for i in range(2)]) if missing else values


def _split(array: Array, axis: int, size: int) -> Array:
    """[A, B] with ``axis`` cut in pieces of ``size``, an axis of their own."""
    return array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])


def _joined(array: Array, axis: int) -> Array:
    """The inverse of ``_split``."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
