"""Integers in 32-bit words: against the sum of shifted Python integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeploy.formats.words import pack, unpack, words_for

Array = np.ndarray[Any, Any]


def stream(values: list[int], bits: int) -> list[int]:
    """The words of one long row of bits, the first value lowest."""
    row = sum(value << (bits * i) for i, value in enumerate(values))
    return [(row >> (32 * i)) & 0xFFFF_FFFF for i in range(len(values) * bits // 32)]


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([3, 4]), runs=st.integers(1, 3), other=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_words_are_a_row_of_bits(bits: int, runs: int, other: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (other, 32 * runs), np.uint8)
    words = pack(values, bits, axis=1)
    assert words.dtype == np.int32
    assert words.view(np.uint32).tolist() == [stream(row, bits) for row in values.tolist()]
    assert words.shape == (other, words_for(32 * runs, bits))
    np.testing.assert_array_equal(unpack(words, bits, axis=1), values)
    np.testing.assert_array_equal(pack(values.T, bits, axis=0), words.T)
    np.testing.assert_array_equal(unpack(words.T, bits, axis=0), values.T)


def test_three_bits_across_the_border_of_words() -> None:
    values = np.zeros((1, 32), np.uint8)
    values[0, 10], values[0, 21] = 0b110, 0b011
    assert pack(values, 3, axis=1).view(np.uint32).tolist() == [[0b10 << 30, 1 << 31 | 0b1, 0b01]]


def test_order_names_what_each_place_holds() -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    values = np.arange(8, dtype=np.uint8)[None]
    assert pack(values, 4, axis=1, order=order).view(np.uint32).item() == 0x7531_6420
    np.testing.assert_array_equal(unpack(pack(values, 4, 1, order), 4, 1, order), values)
    assert (unpack(pack(values, 4, 1, order), 4, 1) != values).any()


def test_a_last_run_is_filled_up() -> None:
    words = pack(np.full((2, 9), 15, np.uint8), 4, axis=1)
    assert words.view(np.uint32).tolist() == [[0xFFFF_FFFF, 0xF]] * 2


def test_integers_of_too_many_bits() -> None:
    with pytest.raises(ValueError, match=r"values must lie in 0…7 to be packed in 3 bits, have 8"):
        pack(np.full((1, 32), 8, np.uint8), 3, axis=1)
