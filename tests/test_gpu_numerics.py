"""What the GPU computes against what the CPU computes (scripts/gpu_suite)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedAttentionCall, ScoreOptions, paged_attention
from pallas_kernels.unstack import unstack

pytestmark = pytest.mark.gpu

BLOCKS, BLOCK_SIZE, KV_HEADS, GROUP, HEAD_DIM = 64, 16, 2, 4, 64
CONTEXTS = (1, 15, 16, 17, 100)  # tokens before the row, around the edges of a block


def attention_inputs(queries: int) -> tuple[np.ndarray[Any, Any], ...]:
    random = np.random.default_rng(0)
    rows, entries = len(CONTEXTS), BLOCKS // len(CONTEXTS)
    q = random.standard_normal((rows, queries, KV_HEADS * GROUP, HEAD_DIM), np.float32)
    pool = random.standard_normal((BLOCKS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.float32)
    tables = random.permutation(BLOCKS)[: rows * entries].reshape(rows, entries).astype(np.int32)
    return q, pool, tables, np.array(CONTEXTS, np.int32), np.full(rows, queries, np.int32)


def attend(device: jax.Device, queries: int, window: int | None, dtype: str) -> np.ndarray[Any, Any]:
    q, pool, *rest = jax.device_put(attention_inputs(queries), device)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        scores = ScoreOptions(HEAD_DIM**-0.5, window)
        out = paged_attention(PagedAttentionCall(q.astype(dtype), pool.astype(dtype), *rest, scores=scores))
    return np.asarray(out.astype(jnp.float32))


def machine_epsilon(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_paged_attention(dtype: str, queries: int, window: int | None) -> None:
    gpu, cpu = jax.devices("cuda")[0], jax.devices("cpu")[0]
    # Outputs are of size 1 to 4: roundings of probabilities and output, and float32 sums over H products, then tokens.
    tolerance = 4 * machine_epsilon(dtype) + 4 * HEAD_DIM**0.5 * machine_epsilon("float32")
    np.testing.assert_allclose(attend(gpu, queries, window, dtype), attend(cpu, queries, window, dtype), atol=tolerance)


def test_unstack() -> None:
    rows = jax.random.normal(jax.random.key(0), (65, 4096), jnp.bfloat16)
    for row, array in zip(rows, jax.jit(unstack)(rows), strict=True):
        np.testing.assert_array_equal(row, array)
