"""Attention over paged keys and values: what callers see of the op, and its reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.models.attention import dense_attention
from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.kv_cache_write import kv_cache_write
from pallas_kernels.kv_pool import Pool, stored
from pallas_kernels.numerics import unit_roundoff
from pallas_kernels.paged_attention import BACKENDS, PagedAttentionCall, ScoreOptions, paged_attention, reference
from pallas_kernels.paged_attention.shapes import SHAPES, TEST_SHAPES, Shape, cost
from pallas_kernels.paged_attention.tiles import Tiles
from pallas_kernels.target import Target
from tests.paged_attention_truth import FAST_COMPILE, made, rescored, worst
from tests.selection import every_other

PLAIN = TEST_SHAPES[0]
SINKS = next(shape for shape in TEST_SHAPES if shape.slopes and shape.sinks)
FLOAT32 = Shape("float32", 7, 5, 6, 2, 32, (0, 1, 14, 15, 16, 17, 40), block_size=16, window=20, dtype="float32")


@partial(jax.jit, static_argnames="platform", compiler_options=FAST_COMPILE)
def attend(call: PagedAttentionCall, platform: str = "cpu") -> jax.Array:
    """``platform`` is what the reference takes this machine for; static, so that each has a program of its own."""
    with mock.patch.object(reference, "current_target", return_value=Target(platform, platform)):
        return paged_attention(call, backend="reference")


@pytest.mark.parametrize("shape", every_other([*TEST_SHAPES, FLOAT32]), ids=str)
def test_reference(shape: Shape) -> None:
    call = made(shape)
    assert worst(call, attend(call)) < 1


@pytest.mark.parametrize("shape", [FLOAT32, TEST_SHAPES[4]], ids=str)
def test_all_rows_at_once(shape: Shape) -> None:
    """As on a GPU; on a CPU row follows row."""
    call = made(shape)
    assert worst(call, attend(call, platform="gpu")) < 1


def swap_keys_and_values(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=stored(call.pool)[:, ::-1])


def swap_kv_heads(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=stored(call.pool)[:, :, ::-1])


def shift_block_tables(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, block_tables=jnp.roll(call.block_tables[::-1], 1, axis=0))


def start_one_earlier(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, first_positions=jnp.maximum(call.first_positions - 1, 0))


@pytest.mark.parametrize("mutate", [swap_keys_and_values, shift_block_tables, swap_kv_heads, start_one_earlier])
@pytest.mark.parametrize("shape", [PLAIN, FLOAT32], ids=str)
def test_a_wrong_input_is_noticed(mutate: Any, shape: Shape) -> None:
    call = made(shape)
    assert worst(call, attend(mutate(call))) > 10


@pytest.mark.parametrize("changed", [{"window": 19}, {"window": 21}, {"window": None}, {"softcap": 5.0}], ids=str)
def test_a_wrong_option_is_noticed(changed: dict[str, Any]) -> None:
    call = made(FLOAT32)
    assert worst(rescored(call, **changed), attend(call)) > 10


@pytest.mark.parametrize("name", ["slopes", "sinks"])
def test_a_wrong_slope_or_sink_is_noticed(name: str) -> None:
    call = made(SINKS)
    for other in (None, jnp.roll(getattr(call.scores, name), 1)):
        assert worst(rescored(call, **{name: other}), attend(call)) > 2


def test_rows_without_tokens_are_finite() -> None:
    call = made(FLOAT32)
    empty = replace(call, lengths=jnp.zeros_like(call.lengths))
    assert np.isfinite(np.asarray(attend(empty))).all()


@pytest.mark.parametrize("window", [None, 10])
def test_paged_is_dense(window: int | None) -> None:
    """Keys and values written in two parts into scattered blocks give what the dense call gives."""
    random = np.random.default_rng(1)
    qkv = jnp.asarray(random.standard_normal((40, 2, 5, 16), np.float32))
    table = np.array([[5, 0, 3]], np.int32)
    slots = jnp.asarray(table[0, np.arange(40) // 16] * 16 + np.arange(40) % 16)
    cos, sin = jnp.ones((40, 8), jnp.float32), jnp.zeros((40, 8), jnp.float32)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(pool: Pool) -> tuple[jax.Array, jax.Array]:
        queries = []
        for part in (slice(0, 7), slice(7, 40)):
            q, pool = kv_cache_write(qkv[part], cos[part], sin[part], pool, slots[part])
            queries.append(q)
        q = jnp.concatenate(queries)[None]
        rows = (jnp.asarray(table), *(jnp.array([n], jnp.int32) for n in (0, 40)))
        dense = dense_attention(q, qkv[None, :, :, -2], qkv[None, :, :, -1], scores=ScoreOptions(0.25, window))
        return paged_attention(PagedAttentionCall(q, pool, *rows, scores=ScoreOptions(0.25, window))), dense

    paged, dense = both(jnp.zeros((6, 2, 2, 16, 16), jnp.float32))
    # Logits below 10 from sums over H, and outputs below 4 from sums over the tokens.
    believable = 4 * unit_roundoff(jnp.float32) * (10 * 16**0.5 + 40**0.5)
    np.testing.assert_allclose(paged, dense, rtol=0, atol=believable)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("queries", (7, 1, 5, 64)),
        ("queries", (7, 1, 8, 32)),
        ("block_tables", (6, 7)),
        ("first_positions", (6,)),
        ("lengths", (8,)),
        ("pool", (49, 1, 2, 16, 64)),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    call = made(PLAIN)
    changed: Any = {name: jnp.zeros(shape, getattr(call, name).dtype)}
    with pytest.raises(ValueError, match=r"does not fit|must each have"):
        paged_attention(replace(call, **changed))


@pytest.mark.parametrize("changed", [{"scale": 0.0}, {"window": 0}, {"softcap": -1.0}], ids=str)
def test_options_that_make_no_sense(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(scale|window|softcap)=\S+ must be positive"):
        paged_attention(rescored(made(PLAIN), **changed))


@pytest.mark.parametrize("name", ["slopes", "sinks"])
def test_operands_per_head_that_do_not_fit(name: str) -> None:
    for array, found in ((jnp.zeros(7), r"float32\(7,\)"), (jnp.zeros(8, jnp.bfloat16), r"bfloat16\(8,\)")):
        with pytest.raises(ValueError, match=rf"^{name} {found} must be float32 \[8\], one for each query head"):
            paged_attention(rescored(made(PLAIN), **{name: array}))


def test_the_reference_has_no_tiles() -> None:
    with pytest.raises(NoBackendError, match="reference has no tiles"):
        paged_attention(made(PLAIN), backend="reference", tiles=Tiles(16, 64, 1, 4, 3))


def test_a_cpu_takes_the_reference() -> None:
    call = made(PLAIN)
    with mock.patch.object(reference, "run", return_value=call.queries) as run:
        paged_attention(call)
    assert run.called
    assert list(BACKENDS)[-1] == "reference"


def test_cost() -> None:
    """Of one token after 4095 others, and of a chunk: bytes of keys and values, and a multiplication for each pair."""
    step, *_ = SHAPES
    moved, work = cost(step)
    assert moved == 2 * 2 * 8 * 128 * 4096 + 2 * 2 * 32 * 128
    assert work == 4 * 4096 * 32 * 128
    chunk = Shape("chunk", 1, 32, 4, 2, 64, (100,), "int8", rows=2, window=50)
    assert cost(chunk) == (2 * (49 + 64) * 2 * 68 + 2 * 2 * 64 * 4 * 64, 4 * 64 * 50 * 4 * 64)
