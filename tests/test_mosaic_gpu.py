"""The Hopper kernels, interpreted with their 16-bit operands in shared memory, against float64.

From registers wgmma can only be had on a GPU. Where jax is too old for the kernels, what is tested is that they say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import RefusalError
from pallas_kernels.hopper import MIN_JAX, SHARED_MEMORY, need_hopper
from pallas_kernels.kv_pool import QuantizedPool, quantize, stored
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.paged_attention import PagedAttentionCall
from pallas_kernels.paged_attention import hopper_tiles as attention_tiles
from pallas_kernels.paged_attention import pallas_mosaic_gpu as attention
from pallas_kernels.paged_attention import shapes as attention_shapes
from pallas_kernels.target import Target
from pallas_kernels.w4a16_matmul import W4A16MatmulCall
from pallas_kernels.w4a16_matmul import hopper_tiles as matmul_tiles
from pallas_kernels.w4a16_matmul import pallas_mosaic_gpu as matmul
from pallas_kernels.w4a16_matmul import shapes as matmul_shapes
from pallas_kernels.w4a16_matmul.tiles import Tiles
from tests.paged_attention_truth import FAST_COMPILE, made, rescored, worst
from tests.test_w4a16_matmul import MUTATIONS, excess

Array = np.ndarray[Any, Any]

NEW = jax.__version_info__ >= MIN_JAX
HOPPER = DEVICES["h200"].target


def interpreted(backend: ModuleType, call: Any, tiles: Any = None) -> Any:
    """What ``backend`` gives; ``None`` where jax is too old for it, and it has said so."""
    if NEW:
        return compiled(backend, tiles)(call)
    with pytest.raises(RefusalError, match=r"needs jax 0\.11\.2, have 0\.1"):
        backend.check(call)
    return None


def checked(backend: ModuleType, call: Any, tiles: Any = None) -> Any:
    """Run a call as ``dispatch`` does."""
    backend.check(call)
    return backend.run(call, tiles)


@cache
def compiled(backend: ModuleType, tiles: Any) -> Callable[[Any], Any]:
    """Traced once for all calls of the same shapes and options."""
    return jax.jit(lambda call: checked(backend, call, tiles), compiler_options=FAST_COMPILE)


@cache
def weights(shape: matmul_shapes.Shape) -> W4A16MatmulCall:
    call: W4A16MatmulCall = jax.jit(lambda: matmul_shapes.make_call(shape), compiler_options=FAST_COMPILE)()
    return call


@pytest.mark.parametrize("backend", [matmul, attention])
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target("cpu", "cpu"), "needs a GPU, have cpu"),
        (replace(HOPPER, capability=(8, 0)), "needs sm_90, have sm_80"),
        (replace(HOPPER, capability=(10, 0)), "needs sm_90, have sm_100"),
    ],
)
def test_other_devices_are_refused(backend: ModuleType, target: Target, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        backend.check_device(target)


@pytest.mark.parametrize(
    ("version", "reason"), [((0, 10, 2), "needs jax 0.11.2"), ((0, 11, 1), "needs jax 0.11.2"), ((0, 11, 2), None)]
)
def test_an_old_jax_is_refused(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], reason: str | None) -> None:
    monkeypatch.setattr(jax, "__version_info__", version)
    if reason is None:
        need_hopper(HOPPER)
    else:
        with pytest.raises(RefusalError, match=reason):
            need_hopper(HOPPER)


# --- w4a16_matmul

PRODUCT = matmul_shapes.Shape("five chunks", 150, 640, 256, group_size=64, bias=True)
NARROW = matmul_tiles.HopperTiles(128, chunks=2, halves=3)

PRODUCTS = [
    (PRODUCT, NARROW),
    (replace(PRODUCT, k=128, dtype="float16", symmetric=True), NARROW),
    (replace(PRODUCT, m=128, k=256, n=128, bias=False), matmul_tiles.HopperTiles(64, chunks=1, halves=2)),
    (replace(PRODUCT, m=257, k=256, group_size=32), matmul_tiles.HopperTiles(256, chunks=3, halves=5)),
    (replace(PRODUCT, m=257, k=384, n=512, group_size=128), matmul_tiles.HopperTiles(192, 2, 4, cluster=2)),
    (replace(PRODUCT, m=128, k=256, n=768, group_size=-1), None),
]
"""Every group size, one CTA and clusters, one tile and several, the last with one row; one slot and many."""


def error(call: W4A16MatmulCall, got: Any) -> float:
    """In units of what is believable; like the xla backend, this one rounds each weight."""
    return excess(got, tuple(jax.tree.leaves(call)), str(call.x.dtype), "xla")


@pytest.mark.parametrize(("shape", "tiles"), PRODUCTS, ids=str)
def test_product(shape: matmul_shapes.Shape, tiles: matmul_tiles.HopperTiles | None) -> None:
    call = weights(shape)
    got = interpreted(matmul, call, tiles)
    if got is not None:
        assert (got.shape, got.dtype) == ((shape.m, shape.n), shape.dtype)
        assert error(call, got) < 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_weight_is_noticed(mutation: str) -> None:
    call = weights(replace(PRODUCT, n=128))
    arrays = [np.array(array) for array in jax.tree.leaves(call)]
    MUTATIONS[mutation](arrays)
    got = interpreted(matmul, W4A16MatmulCall(*map(jnp.asarray, arrays)), NARROW)
    if got is not None:
        assert error(call, got) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("through_memory", [False, True])
@pytest.mark.parametrize(("shape", "tiles"), PRODUCTS, ids=str)
def test_product_on_a_gpu(
    shape: matmul_shapes.Shape, tiles: matmul_tiles.HopperTiles | None, through_memory: bool
) -> None:
    call = weights(shape)
    if tiles is not None:
        tiles = replace(tiles, through_memory=through_memory, halves=min(tiles.halves, 4))
    assert error(call, interpreted(matmul, call, tiles)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 14336])
def test_product_of_a_real_size_on_a_gpu(k: int) -> None:
    call = weights(matmul_shapes.Shape("Llama-3-8B", 4096, k, 4096))
    rows = slice(0, 4096, 97)
    assert error(replace(call, x=call.x[rows]), interpreted(matmul, call)[rows]) < 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m": 127}, "is for prefill: M=127 is below 128"),
        ({"n": 192}, "needs a multiple of 128 columns, have N=192"),
        ({"dtype": "float32"}, "multiplies bfloat16 or float16, have float32"),
    ],
)
def test_products_that_are_refused(change: dict[str, Any], reason: str) -> None:
    call = weights(replace(PRODUCT, **change))
    with pytest.raises(RefusalError, match=reason if NEW else "needs jax"):
        checked(matmul, call, NARROW)


def test_tiles_of_another_backend_are_refused() -> None:
    with pytest.raises(RefusalError, match="takes HopperTiles" if NEW else "needs jax"):
        checked(matmul, weights(PRODUCT), Tiles(128, 128, 1, 8, 3))


@pytest.mark.parametrize("tiles", [replace(NARROW, halves=1), replace(NARROW, halves=16)])
def test_tiles_that_deadlock_or_do_not_fit(tiles: matmul_tiles.HopperTiles) -> None:
    error, reason = (ValueError, "must have 2 halves") if NEW else (RefusalError, "needs jax")
    with pytest.raises(error, match=reason):
        checked(matmul, weights(PRODUCT), tiles)


def test_products_fit_into_shared_memory() -> None:
    for shape in matmul_shapes.SHAPES:
        for tiles in (matmul_tiles.heuristic(shape.m, shape.n, HOPPER), *matmul_tiles.candidates(shape.m, shape.n)):
            assert tiles.shared_memory(20) < SHARED_MEMORY - 1024, "and barriers besides"
            assert shape.n % (matmul_tiles.TILE_N * tiles.cluster) == 0


# --- paged_attention

CHUNK = attention_shapes.Shape(
    "chunks", 2, 32, 4, 1, 64, contexts=(0, 100), rows=2, lengths=(32, 32, 32, 5), dtype="float16"
)
ROWS = attention_shapes.Shape("rows", 4, 20, 14, 2, 64, contexts=(0, 63, 64, 200), lengths=(20, 1, 0, 19))

CALLS = [
    (CHUNK, None),
    (ROWS, attention_tiles.HopperTiles(2, 64, 2)),
    (replace(ROWS, heads=6, kv_heads=1, window=70, block_size=128), None),
    (replace(CHUNK, heads=2, kv_heads=2, queries=64, rows=1, softcap=2.0, window=1), None),
    (
        replace(CHUNK, sequences=1, rows=1, heads=16, contexts=(97,), lengths=None, shared=True),
        attention_tiles.HopperTiles(1, 128, 1),
    ),
    (replace(CHUNK, heads=1, rows=1), None),
    (replace(CHUNK, head_dim=128, contexts=(128,), sequences=1, softcap=3.0), None),
    (replace(CHUNK, head_dim=256, contexts=(64,), sequences=1, dtype="bfloat16"), None),
]
"""Contexts around the edges of blocks and tiles, empty rows, padding, odd groups and large ones, every option."""


@pytest.mark.parametrize(("shape", "tiles"), CALLS, ids=str)
def test_attention(shape: attention_shapes.Shape, tiles: attention_tiles.HopperTiles | None) -> None:
    call = made(shape)
    got = interpreted(attention, call, tiles)
    if got is not None:
        assert worst(call, got) < 1


def shift_tables(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, block_tables=jnp.roll(call.block_tables, 1, axis=1) % stored(call.pool).shape[0])


def swap_keys_and_values(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=stored(call.pool)[:, ::-1])


def swap_kv_heads(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, pool=stored(call.pool)[:, :, ::-1])


def swap_query_heads(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, queries=jnp.roll(call.queries, 1, axis=2))


def start_one_later(call: PagedAttentionCall) -> PagedAttentionCall:
    return replace(call, first_positions=call.first_positions + 1)


def widen_the_window(call: PagedAttentionCall) -> PagedAttentionCall:
    assert call.scores.window is not None
    return rescored(call, window=call.scores.window + 1)


def forget_the_cap(call: PagedAttentionCall) -> PagedAttentionCall:
    return rescored(call, softcap=None)


@pytest.mark.parametrize(
    "mutate",
    [
        shift_tables,
        swap_keys_and_values,
        swap_kv_heads,
        swap_query_heads,
        start_one_later,
        widen_the_window,
        forget_the_cap,
    ],
)
def test_a_wrong_argument_is_noticed(mutate: Callable[[PagedAttentionCall], PagedAttentionCall]) -> None:
    call = made(replace(ROWS, sequences=1, contexts=(90,), lengths=None, window=40, softcap=1.0))
    got = interpreted(attention, mutate(call))
    if got is not None:
        assert worst(call, got) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("through_memory", [False, True])
@pytest.mark.parametrize(("shape", "tiles"), CALLS, ids=str)
def test_attention_on_a_gpu(
    shape: attention_shapes.Shape, tiles: attention_tiles.HopperTiles | None, through_memory: bool
) -> None:
    call = made(shape)
    chosen = tiles or attention_tiles.heuristic(shape.problem)
    assert worst(call, interpreted(attention, call, replace(chosen, through_memory=through_memory))) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [32, 128])
def test_attention_of_a_real_size_on_a_gpu(queries: int) -> None:
    shape = attention_shapes.Shape(
        "Llama-3-8B", 1, queries, 32, 8, 128, contexts=(2048,), rows=512 // queries, lengths=(queries,)
    )
    call = made(shape)
    assert worst(call, interpreted(attention, call)) < 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queries": 1, "rows": 1, "lengths": None}, "is for prefill: rows of Q=1 are decode"),
        ({"dtype": "float32"}, "needs queries and keys in bfloat16 or both in float16, have float32 and float32"),
        ({"head_dim": 80}, "needs a head_dim of 64, 128 or 256, have 80"),
        ({"block_size": 32}, "needs blocks of 64 tokens, or of 128 .*, have 32"),
        ({"block_size": 128, "head_dim": 256}, "needs blocks of 64 tokens, or of 128 .*, have 128"),
        ({"queries": 20, "heads": 1, "lengths": None}, "fills no wgmma: Q=20 tokens of 1 heads that share keys"),
        ({"slopes": True}, "does not support slopes"),
        ({"slopes": True, "sinks": True}, "does not support slopes and sinks"),
    ],
)
def test_calls_that_are_refused(change: dict[str, Any], reason: str) -> None:
    call = made(replace(CHUNK, **change))
    with pytest.raises(RefusalError, match=reason if NEW else "needs jax"):
        checked(attention, call)


def test_a_quantised_pool_is_refused() -> None:
    call = made(CHUNK)
    values, scales = quantize(stored(call.pool), 8)
    pool = QuantizedPool(values, jnp.swapaxes(scales, -1, -2))
    with pytest.raises(RefusalError, match="needs a plain pool" if NEW else "needs jax"):
        checked(attention, replace(call, pool=pool))


@pytest.mark.parametrize("group", range(1, 33))
def test_heads_and_tokens_together(group: int) -> None:
    heads = attention_tiles.heads_together(group)
    tokens = attention_tiles.tokens_together(heads)
    assert group % heads == 0
    assert 32 < heads * tokens <= attention_tiles.VECTORS or heads == 5, "more than half of a wgmma's rows are used"
    assert tokens % 8 == 0, "copies go to whole atoms of eight rows"
    assert tokens & (tokens - 1) == 0


def test_calls_fit_into_shared_memory() -> None:
    for head_dim in (64, 128, 256):
        for block_size in (64, 128)[: 1 if head_dim == 256 else 2]:
            problem = replace(ROWS, head_dim=head_dim, block_size=block_size).problem
            for tiles in (attention_tiles.heuristic(problem), *attention_tiles.candidates(problem)):
                assert tiles.shared_memory(head_dim) < SHARED_MEMORY - 1024, "and barriers besides"
                assert tiles.tile_n % block_size == 0
