"""Packing 4-bit weights: there and back, and from the layouts of AWQ and GPTQ, written here number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.w4a16_matmul import layout, packing
from tests.packed_weights import weight_of

Array = np.ndarray[Any, Any]


def drawn(k: int, n: int, group_size: int, seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else k // group_size
    scales = random.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    return random.integers(0, 16, (k, n), np.uint8), scales, random.integers(0, 17, (groups, n), np.uint8)


def dense(q: Array, scales: Array, zeros: Array) -> Array:
    """The weight float64 [K, N]."""
    rows = len(q) // len(scales)
    weight: Array = (q.astype(np.float64) - np.repeat(zeros, rows, axis=0)) * np.repeat(
        scales.astype(np.float64), rows, axis=0
    )
    return weight


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.integers(1, 4),
    n=st.integers(1, 9),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 2**16),
)
def test_pack_and_unpack(chunks: int, n: int, group_size: int, seed: int) -> None:
    weight = drawn(128 * chunks, n, group_size, seed)
    packed = packing.pack(*weight, group_size)
    stored = 128 if group_size == -1 else group_size
    assert (packed.shape, packed.dtype) == ((chunks, 16 + 128 // stored, n), np.int32)
    assert layout.group_size(packed.shape) == stored
    assert layout.packed_shape(128 * chunks, (n,), stored) == packed.shape
    assert layout.input_size(packed.shape) == 128 * chunks
    q, scales, zeros = packing.unpack(packed)
    np.testing.assert_array_equal(q, weight[0])
    np.testing.assert_array_equal(weight_of(packed), dense(*weight))
    np.testing.assert_array_equal(dense(q, scales, zeros), dense(*weight))


def test_large_groups_are_stored_repeated() -> None:
    weight = drawn(512, 8, 256)
    packed = packing.pack(*weight, 256)
    assert packed.shape == (4, 17, 8)
    np.testing.assert_array_equal(weight_of(packed), dense(*weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((100, 8), np.uint8)}, "K=100 must be a multiple of 128"),
        ({"q": np.full((256, 8), 16)}, "q must lie in 0…15, have 16…16"),
        ({"q": np.full((256, 8), -1)}, "q must lie in"),
        ({"zeros": np.full((4, 8), 17)}, "zeros must lie in 0…16"),
        ({"scales": np.full((4, 8), 1e5)}, "scales must be finite"),
        ({"scales": np.ones((2, 8))}, r"must both be \[K / g, N\] = \(4, 8\)"),
        ({"group_size": 16}, "group_size=16 must be 32"),
        ({"group_size": 512}, "group_size=512 must be 32"),
        ({"group_size": 96}, "group_size=96 must be 32"),
        ({"group_size": 0}, "group_size=0 must be 32"),
        ({"group_size": -128}, "group_size=-128 must be 32"),
    ],
)
def test_weights_that_cannot_be_packed(change: dict[str, Any], message: str) -> None:
    q, scales, zeros = drawn(256, 8, 64)
    with pytest.raises(ValueError, match=message):
        packing.pack(**{"q": q, "scales": scales, "zeros": zeros, "group_size": 64, **change})


def words_of(values: list[list[int]]) -> Array:
    """Each list of eight numbers as a word, the first lowest."""
    return np.array([sum(v << 4 * i for i, v in enumerate(eight)) for eight in values], np.uint32).view(np.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def along_columns(values: Array, order: tuple[int, ...]) -> Array:
    rows = [[[int(row[c + o]) for o in order] for c in range(0, len(row), 8)] for row in values]
    return np.stack([words_of(row) for row in rows])


def along_rows(values: Array) -> Array:
    return np.stack(
        [
            words_of([[int(v) for v in values[r : r + 8, c]] for c in range(values.shape[1])])
            for r in range(0, len(values), 8)
        ]
    )


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq(group_size: int) -> None:
    q, scales, zeros = drawn(256, 24, group_size)
    zeros = np.minimum(zeros, 15)
    packed = packing.from_awq(along_columns(q, AWQ_ORDER), along_columns(zeros, AWQ_ORDER), scales)
    np.testing.assert_array_equal(weight_of(packed), dense(q, scales, zeros))


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_gptq(group_size: int, zero_offset: int) -> None:
    q, scales, zeros = drawn(256, 24, group_size)
    zeros = np.clip(zeros, zero_offset, 15 + zero_offset)
    stored = along_columns(zeros - zero_offset, tuple(range(8)))
    in_order = np.repeat(np.arange(len(scales), dtype=np.int32), 256 // len(scales))
    for g_idx in (None, in_order):
        packed, order = packing.from_gptq(along_rows(q), stored, scales, g_idx, zero_offset=zero_offset)
        assert order is None
        np.testing.assert_array_equal(weight_of(packed), dense(q, scales, zeros))


def test_gptq_act_order() -> None:
    """Rows of a group lie anywhere; reordered activations times the packed weight are the product."""
    random = np.random.default_rng(3)
    q, scales, zeros = drawn(256, 24, 64)
    zeros = np.clip(zeros, 1, 16)
    g_idx = random.permutation(np.repeat(np.arange(4, dtype=np.int32), 64))
    packed, order = packing.from_gptq(along_rows(q), along_columns(zeros - 1, tuple(range(8))), scales, g_idx)
    weight = (q.astype(np.float64) - zeros[g_idx]) * scales.astype(np.float64)[g_idx]
    x = random.standard_normal((3, 256))
    assert order is not None
    np.testing.assert_allclose(x[:, order] @ weight_of(packed), x @ weight, rtol=1e-12)


def test_gptq_with_groups_of_different_sizes() -> None:
    q, scales, zeros = drawn(256, 8, 64)
    g_idx = np.repeat(np.arange(4, dtype=np.int32), 64)
    g_idx[0] = 1
    with pytest.raises(ValueError, match="g_idx must give 64 of the 256 rows to each of the 4 groups"):
        packing.from_gptq(along_rows(q), along_columns(np.minimum(zeros, 15), tuple(range(8))), scales, g_idx)
