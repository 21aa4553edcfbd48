"""Attention over paged keys and values, against a softmax spelled out in numpy for every query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.models.attention import dense_attention
from pallas_kernels import backend_report
from pallas_kernels.dispatch import NoBackendError, RefusalError, dispatch
from pallas_kernels.paged_attention import BACKENDS, paged_attention, write_kv

Array = np.ndarray[Any, Any]

HEAD_DIM = 16
CONTEXTS = (0, 1, 15, 16, 17, 63, 64, 90)  # tokens before the row: around the edges of blocks of 16 and 64
TOKENS = 128


@dataclass(frozen=True)
class Case:
    """One call; ``padding`` tokens at the end of every row are not real."""

    queries: int
    kv_heads: int = 2
    group: int = 3
    block_size: int = 16
    window: int | None = None
    dtype: str = "float32"
    padding: int = 0


CASES = [
    Case(1),
    Case(1, window=20),
    Case(1, block_size=64),
    Case(1, kv_heads=1, group=8),
    Case(1, kv_heads=4, group=1, window=1),
    Case(20),
    Case(20, window=20),
    Case(20, window=7, padding=6),
    Case(20, block_size=64, padding=19),
    Case(20, kv_heads=1, group=4),
    Case(1, dtype="bfloat16"),
    Case(20, dtype="bfloat16", window=20),
    Case(20, dtype="float16"),
]


def inputs(case: Case) -> list[Array]:
    """q, pool, block_tables, first_positions, lengths. No block belongs to two rows."""
    random = np.random.default_rng(0)
    rows, entries = len(CONTEXTS), TOKENS // case.block_size
    blocks = rows * entries + 3
    pool = random.standard_normal((blocks, 2, case.kv_heads, case.block_size, HEAD_DIM), np.float32)
    tables = random.permutation(blocks)[: rows * entries].reshape(rows, entries).astype(np.int32)
    q = random.standard_normal((rows, case.queries, case.kv_heads * case.group, HEAD_DIM), np.float32)
    lengths = np.full(rows, case.queries - case.padding, np.int32)
    dtype = jnp.dtype(case.dtype)
    return [q.astype(dtype), pool.astype(dtype), tables, np.array(CONTEXTS, np.int32), lengths]


def expected(case: Case, arrays: list[Array]) -> Array:
    """[R, Q, N, H] in float64, one query head after the other."""
    q, pool, tables, contexts, lengths = arrays
    out = np.zeros(q.shape)
    for row, query, head in np.ndindex(*q.shape[:3]):
        if query >= lengths[row]:
            continue
        position = int(contexts[row]) + query
        first = 0 if case.window is None else max(0, position - case.window + 1)
        places = [(tables[row, p // case.block_size], p % case.block_size) for p in range(first, position + 1)]
        keys, values = (
            np.stack([pool[block, part, head // case.group, offset] for block, offset in places]).astype(np.float64)
            for part in (0, 1)
        )
        scores = keys @ q[row, query, head].astype(np.float64) / HEAD_DIM**0.5
        weights = np.exp(scores - scores.max())
        out[row, query, head] = weights @ values / weights.sum()
    return out


@partial(jax.jit, static_argnames=("window", "platform"))
def attend(*arrays: Array, window: int | None, platform: str = "cpu") -> jax.Array:
    """``platform`` is what the reference takes this machine for; static, so that each has a program of its own."""
    q, pool, tables, contexts, lengths = map(jnp.asarray, arrays)
    with mock.patch("jax.default_backend", return_value=platform):
        return paged_attention(q, pool, tables, contexts, lengths, scale=HEAD_DIM**-0.5, window=window)


def error(case: Case, arrays: list[Array], truth: Array | None = None, platform: str = "cpu") -> float:
    """Largest difference over the real tokens."""
    real = np.arange(case.queries) < arrays[4][:, None]
    got = np.asarray(attend(*arrays, window=case.window, platform=platform)).astype(np.float64)
    assert np.isfinite(got).all(), "padding is finite too"
    return float(np.abs(got - (expected(case, arrays) if truth is None else truth))[real].max())


def tolerance(case: Case) -> float:
    """Outputs stay below 4, so rounding them costs up to 2 eps; float32 sums run over H products, then the tokens."""
    eps, sums = float(jnp.finfo(case.dtype).eps), float(jnp.finfo("float32").eps)
    return 2 * eps * (case.dtype != "float32") + 2 * sums * float(HEAD_DIM**0.5 + TOKENS**0.5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_reference(case: Case, platform: str) -> None:
    """Row after row, as on a CPU, and all rows at once, as on a GPU."""
    arrays = inputs(case)
    assert error(case, arrays, platform=platform) < tolerance(case)


MUTATED = Case(1, window=20)


def swap_keys_and_values(arrays: list[Array]) -> None:
    arrays[1] = arrays[1][:, ::-1]


def shift_block_tables(arrays: list[Array]) -> None:
    arrays[2] = np.roll(arrays[2], 1, axis=1)


def swap_kv_heads(arrays: list[Array]) -> None:
    arrays[1] = arrays[1][:, :, ::-1]


def start_one_later(arrays: list[Array]) -> None:
    arrays[3] = arrays[3] + 1


@pytest.mark.parametrize("mutate", [swap_keys_and_values, shift_block_tables, swap_kv_heads, start_one_later])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_input_is_noticed(mutate: Any, dtype: str) -> None:
    case = replace(MUTATED, dtype=dtype)
    arrays = inputs(case)
    truth = expected(case, arrays)
    mutate(arrays)
    assert error(case, arrays, truth) > 20 * tolerance(case)


@pytest.mark.parametrize("window", [19, 21, None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_window_is_noticed(window: int | None, dtype: str) -> None:
    case = replace(MUTATED, dtype=dtype)
    arrays = inputs(case)
    assert error(replace(case, window=window), arrays, expected(case, arrays)) > 10 * tolerance(case)


def test_rows_without_tokens_are_finite() -> None:
    arrays = inputs(Case(20))
    arrays[4][:] = 0
    assert np.isfinite(np.asarray(attend(*arrays, window=None))).all()


def test_blocks_beyond_the_context_are_not_used() -> None:
    case = Case(1)
    arrays = inputs(case)
    truth = expected(case, arrays)
    for row, context in enumerate(CONTEXTS):
        arrays[2][row, context // case.block_size + 1 :] = 10**6
    assert error(case, arrays, truth) < tolerance(case)


@pytest.mark.parametrize("window", [None, 10])
def test_paged_is_dense(window: int | None) -> None:
    """Keys and values written token by token into scattered blocks give what the dense call gives."""
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((40, heads, HEAD_DIM), np.float32) for heads in (6, 2, 2))
    table = np.array([[5, 0, 3]], np.int32)
    slots = table[0, np.arange(40) // 16] * 16 + np.arange(40) % 16
    pool = jnp.zeros((6, 2, 2, 16, HEAD_DIM), jnp.float32)
    for part in (slice(0, 7), slice(7, 40)):
        pool = write_kv(pool, jnp.asarray(k[part]), jnp.asarray(v[part]), jnp.asarray(slots[part]))
    paged = attend(q[None], np.asarray(pool), table, np.array([0], np.int32), np.array([40], np.int32), window=window)
    dense = dense_attention(*(jnp.asarray(x)[None] for x in (q, k, v)), window=window)
    np.testing.assert_allclose(paged, dense, rtol=0, atol=tolerance(Case(40)))


def test_write_kv_touches_its_slots_only() -> None:
    pool = jnp.full((3, 2, 2, 4, 8), 7.0, jnp.bfloat16)
    k = jnp.ones((3, 2, 8), jnp.float32)
    slots = jnp.array([9, 2, 12], jnp.int32)  # the last lies beyond the pool
    got = np.asarray(write_kv(pool, k, 2 * k, slots)).astype(np.float32)
    assert (got[2, 0, :, 1] == 1).all()
    assert (got[2, 1, :, 1] == 2).all()
    assert (got[0, 0, :, 2] == 1).all()
    assert (got == 7).sum() == got.size - 2 * 2 * 2 * 8


@pytest.mark.parametrize(
    ("index", "shape"), [(0, (8, 1, 5, HEAD_DIM)), (0, (8, 1, 6, 8)), (2, (7, 8)), (3, (7,)), (4, (9,))]
)
def test_shapes_that_do_not_fit(index: int, shape: tuple[int, ...]) -> None:
    arrays = [jnp.asarray(array) for array in inputs(Case(1))]
    arrays[index] = jnp.zeros(shape, arrays[index].dtype)
    with pytest.raises(ValueError, match=r"fit|must each have"):
        paged_attention(*arrays, scale=1.0)


def test_all_refusals_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> jax.Array:
        raise RefusalError("not today")

    arrays = [jnp.asarray(array) for array in inputs(Case(1))]
    monkeypatch.setattr("pallas_kernels.paged_attention.reference.run", refuse)
    with pytest.raises(NoBackendError, match=r"paged_attention: no backend can do this call; .*reference: not today"):
        paged_attention(*arrays, scale=1.0)


def test_the_first_backend_that_accepts_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_kernels.paged_attention.reference.run", lambda value: value + 1)
    module = BACKENDS["reference"]
    assert dispatch("op", {"a": module, "b": module}, ["b"], jnp.int32(1)) == 2


def test_the_report_names_every_backend() -> None:
    lines = [(line.op, line.backend) for line in backend_report()]
    assert lines == [("paged_attention", name) for name in BACKENDS]
    assert all(line.usable or line.reason for line in backend_report())
    assert backend_report()[-1].usable, "the reference runs everywhere"
