"""The Triton kernel of paged attention, interpreted (on a GPU: compiled), against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.kv_pool import QuantizedPool, quantize, stored
from pallas_kernels.numerics import Array
from pallas_kernels.paged_attention import PagedAttentionCall, paged_attention
from pallas_kernels.paged_attention.shapes import (
    NOWHERE,
    SHAPES,
    TEST_SHAPES,
    Shape,
    candidates_for,
    elements_per_trip,
    key_for,
    tiles_for,
)
from pallas_kernels.paged_attention.tiles import Tiles
from pallas_kernels.paged_attention.words import Words, as_words, from_words
from tests.paged_attention_truth import FAST_COMPILE, elements, made, rescored, worst
from tests.selection import every_other

BY_NAME = {shape.model: shape for shape in TEST_SHAPES}


@partial(jax.jit, static_argnames="tiles", compiler_options=FAST_COMPILE)
def attend(call: PagedAttentionCall, tiles: Tiles | None = None) -> jax.Array:
    """Compiled once for each shape and set of options."""
    return paged_attention(call, backend="pallas_triton", tiles=tiles)


def error(call: PagedAttentionCall, truth: PagedAttentionCall | None = None, tiles: Tiles | None = None) -> float:
    """The largest error of ``call``, as a multiple of what is believable of ``truth``."""
    return worst(call if truth is None else truth, attend(call, tiles))


@pytest.mark.parametrize("shape", every_other(TEST_SHAPES), ids=str)
def test_kernel(shape: Shape) -> None:
    assert error(made(shape)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*TEST_SHAPES, *(shape for shape in SHAPES if max(shape.contexts) < 5000)], ids=str)
def test_on_a_gpu(shape: Shape) -> None:
    if shape.dtype == "float32":
        shape = replace(shape, dtype="bfloat16")
    call = made(shape)
    attended = jax.jit(partial(paged_attention, backend="pallas_triton"))(call)
    assert worst(call, attended) < 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape: Shape) -> None:
    """An H200's tiles and splits. Sequences and KV heads are independent, and of a prompt's rows the last see most."""
    tiles, group = tiles_for(shape, "h200"), shape.heads // shape.kv_heads
    skipped = (shape.rows - 1) * shape.queries
    contexts = tuple(min(context + skipped, 4096) for context in shape.contexts)
    narrow = replace(shape, sequences=1, rows=1, heads=group, kv_heads=1, contexts=contexts)
    assert error(made(narrow), tiles=tiles) < 1


@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        ("int4", Tiles(16, 32, 5, 4, 3)),  # more splits than tiles of most contexts leave some empty
        ("sinks, slopes", Tiles(16, 32, 5, 4, 3)),  # sinks count once, in whichever split
        ("chunk", Tiles(32, 16, 3, 4, 2)),  # several tiles of queries
        ("chunk", Tiles(128, 128, 1, 8, 2)),  # one that is larger than all of them
    ],
    ids=str,
)
def test_tiles_change_nothing(name: str, tiles: Tiles) -> None:
    assert error(made(BY_NAME[name]), tiles=tiles) < 1


EXTREMES: dict[str, Callable[[Array], Array]] = {
    "constant": lambda x: np.repeat(x[..., :1], x.shape[-1], axis=-1),
    "zero": np.zeros_like,
    "one large element": lambda x: np.where(np.arange(x.shape[-1]) == 3, 300, x),
    "three of four vectors tiny": lambda x: np.where(np.arange(x.shape[3])[:, None] % 4 == 0, x, x * 1e-4),
    "far from zero": lambda x: x + 50,
}
to_pool = jax.jit(quantize, static_argnames="bits", compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_quantised_extremes(extreme: str, bits: int) -> None:
    """Scales from the least to the largest, in one context: none divides by zero, no weight is lost."""
    shape = BY_NAME["quantised chunk" if bits == 8 else "int4"]
    call = made(shape)
    size = (stored(call.pool).shape[0], 2, shape.kv_heads, shape.block_size, shape.head_dim)
    x = EXTREMES[extreme](np.random.default_rng(0).standard_normal(size))
    values, scales = to_pool(x.astype(np.float32), bits=bits)
    pool = QuantizedPool(values, jnp.asarray(np.asarray(scales).swapaxes(-1, -2)))
    assert error(replace(call, pool=pool)) < 1


def test_rows_without_tokens_are_zero() -> None:
    for name in ("chunk", "quantised chunk"):
        call = made(BY_NAME[name])
        assert not np.asarray(attend(replace(call, lengths=jnp.zeros_like(call.lengths)))).any()


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(("blocks gathered", "int4", "quantised chunk")),
    data=st.data(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_rows(name: str, data: st.DataObject, seed: int) -> None:
    """Contexts, lengths and tables of any kind; shapes are few, since each is compiled."""
    shape = BY_NAME[name]
    call = made(shape)
    room = shape.entries * shape.block_size - shape.queries
    rows = shape.sequences
    firsts = np.array(data.draw(st.lists(st.integers(0, room), min_size=rows, max_size=rows)), np.int32)
    lengths = np.array(data.draw(st.lists(st.integers(0, shape.queries), min_size=rows, max_size=rows)), np.int32)
    blocks = np.random.default_rng(seed).integers(0, call.block_tables.size, call.block_tables.shape, np.int32)
    used = (firsts + lengths)[:, None] > np.arange(shape.entries) * shape.block_size
    tables = np.where(used, blocks, NOWHERE).astype(np.int32)
    arrays = [jnp.asarray(array) for array in (tables, firsts, lengths)]
    assert error(PagedAttentionCall(call.queries, call.pool, *arrays, scores=call.scores)) < 1


def swap_keys_and_values(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=jax.tree.map(lambda x: x[:, ::-1], call.pool))


def swap_kv_heads(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=jax.tree.map(lambda x: x[:, :, ::-1], call.pool))


def shift_block_tables(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, block_tables=jnp.roll(call.block_tables[::-1], 1, axis=0))


def start_one_earlier(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, first_positions=jnp.maximum(call.first_positions - 1, 0))


def swap_elements(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=jax.tree.map(lambda x: x.at[..., :2].set(x[..., 1::-1]), call.pool))


def quantized(call: PagedAttentionCall) -> QuantizedPool:
    assert isinstance(call.pool, QuantizedPool)
    return call.pool


def swap_halves_of_bytes(call: PagedAttentionCall) -> PagedAttentionCall:
    pool = quantized(call)
    return replace(call, pool=replace(pool, values=(pool.values >> 4) | (pool.values << 4)))


def forget_scales(call: PagedAttentionCall) -> PagedAttentionCall:
    pool = quantized(call)
    return replace(call, pool=replace(pool, scales=pool.scales.at[..., 0, :].set(0.2)))


def forget_zeros(call: PagedAttentionCall) -> PagedAttentionCall:
    pool = quantized(call)
    return replace(call, pool=replace(pool, scales=pool.scales.at[..., 1, :].set(0)))


ANY = (swap_keys_and_values, swap_kv_heads, shift_block_tables, start_one_earlier, swap_elements)
QUANTISED = (swap_halves_of_bytes, forget_scales, forget_zeros)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [("blocks gathered", mutate) for mutate in ANY] + [("int4", mutate) for mutate in (*ANY, *QUANTISED)],
)
def test_a_wrong_input_is_noticed(name: str, mutate: Callable[[PagedAttentionCall], PagedAttentionCall]) -> None:
    call = made(BY_NAME[name])
    assert error(mutate(call), call) > 10


@pytest.mark.parametrize("changed", [{"window": 29}, {"window": 31}, {"scale": 0.12}, {"softcap": 5.0}], ids=str)
def test_a_wrong_option_is_noticed(changed: dict[str, Any]) -> None:
    call = made(BY_NAME["int4"])
    assert worst(rescored(call, **changed), attend(call)) > 2


@pytest.mark.parametrize(
    ("name", "changed"), [("sinks, slopes", "slopes"), ("sinks, slopes", "sinks"), ("chunk, slopes", "slopes")]
)
def test_a_wrong_slope_or_sink_is_noticed(name: str, changed: str) -> None:
    call = made(BY_NAME[name])
    values = getattr(call.scores, changed)
    for other in (None, jnp.roll(values, 1)):
        assert worst(rescored(call, **{changed: other}), attend(call)) > 2


@pytest.mark.parametrize("bits", [8, 4])
def test_words_hold_the_elements(bits: int) -> None:
    """Taken apart and put back in order, words are the integers that the pool's layout says."""
    shape = BY_NAME["quantised chunk" if bits == 8 else "int4"]
    pool = quantized(made(shape))
    words = Words(bits, shape.head_dim)
    q = np.zeros((*pool.values.shape[:-1], shape.head_dim))
    parts = words.unpack(as_words(pool)[0])
    for part, (values, base) in enumerate(zip(parts, words.bases, strict=True)):
        q[..., np.asarray(words.elements(part))[: words.count]] = np.asarray(values, np.float64) - base
    scale, zero = (np.asarray(pool.scales, np.float64)[..., i, :, None] for i in (0, 1))
    np.testing.assert_array_equal(scale * q + zero, elements(pool, shape.head_dim)[0])
    jax.tree.map(np.testing.assert_array_equal, from_words(as_words(pool)), pool)


def test_refusals() -> None:
    shape = BY_NAME["blocks gathered"]
    for changed, reason in (
        (replace(shape, head_dim=24), "needs a head_dim that is a multiple of 16 up to 256, have 24"),
        (replace(shape, block_size=24), "needs a block_size that is a power of two from 16 on, have 24"),
    ):
        with pytest.raises(NoBackendError, match=f"pallas_triton {reason}"):
            paged_attention(made(changed), backend="pallas_triton")


def test_every_shape_has_tiles() -> None:
    for shape in SHAPES:
        for device in ("a100", "h200"):
            tiles = tiles_for(shape, device)
            assert tiles.splits == 1 or tiles.splits * tiles.tile_n * 4 <= 2 * shape.entries * shape.block_size
            assert elements_per_trip(shape, tiles) == 2 * tiles.tile_n * shape.head_dim
        assert len(set(candidates_for(shape))) > 3, shape
        assert key_for(shape) == shape.problem.key
    assert len({key_for(shape) for shape in SHAPES}) > 40
