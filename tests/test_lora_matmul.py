"""Tokens times adapters of their own, against a loop over the tokens in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.lora_matmul import BACKENDS, LoRAMatmulCall, lora_matmul
from pallas_kernels.lora_matmul.shapes import SHAPES, TEST_SHAPES, Shape, candidates_for, make_call, tiles_for
from pallas_kernels.lora_matmul.tiles import ProblemSize, Tiles, heuristic
from pallas_kernels.numerics import ACCUMULATOR, Array, sum_bound, unit_roundoff
from tests.selection import complete, every_other

Arrays = tuple[jax.Array, ...]

X, A, B, ADAPTER, CANDIDATES, RANKS = range(6)
"""Places of the arguments."""

MIXED = Shape("mixed", 19, 160, 72, rank=48, slots=5, layers=3, mixed=True, segments=(20, 11, 5))
WHOLE = replace(MIXED, n=256, segments=(64, 32, 32))
"""Its modules fill tiles."""


def make_args(shape: Shape, seed: int = 0) -> Arrays:
    """The arrays of a call, in the order of its fields."""
    return tuple(jax.tree.leaves(make_call(shape, seed)))


def multiplied(shape: Shape, args: Arrays, backend: str | None, tiles: Tiles | None = None) -> Array:
    """What the op gives, in float64."""
    call = LoRAMatmulCall(*args, segments=shape.segments)
    out = jax.jit(partial(lora_matmul, backend=backend, tiles=tiles))(call)
    assert out.dtype == args[X].dtype
    return np.asarray(out, np.float64)


def expected(shape: Shape, args: Arrays) -> tuple[Array, Array]:
    """(the result in float64, the largest believable error): between the products a token may be rounded."""
    x, a, b = (np.asarray(array, np.float64) for array in args[:3])
    rank, columns = b.shape[1], b.shape[2]
    segments, roundoff = shape.segments or (columns,), unit_roundoff(args[X].dtype)
    exact, bound = np.zeros((2, x.shape[0], columns))
    for token, entry in enumerate(np.asarray(args[ADAPTER])):
        for begin in range(0, columns if entry >= 0 else 0, sum(segments)):
            for module, width in enumerate(segments):
                own = slice(begin, begin + width)
                begin += width
                mine, up = a[entry, :, module * rank : module * rank + rank], b[entry, :, own]
                down = x[token] @ mine
                exact[token, own] = down @ up
                through = np.abs(down) @ np.abs(up)
                limit = sum_bound(exact[token, own], through, rank, args[X].dtype, operand_roundoff=roundoff)
                first = np.abs(x[token]) @ np.abs(mine) @ np.abs(up)
                bound[token, own] = limit + 2 * ACCUMULATOR * np.sqrt(x.shape[1]) * first
    return exact, bound


def worst(shape: Shape, args: Arrays, got: Array) -> float:
    """Largest error, in units of what is believable; where nothing but zero is, any other value is far off."""
    exact, bound = expected(shape, args)
    return float((np.abs(got - exact) / np.maximum(bound, 1e-300)).max())


def changed(args: Arrays, place: int, array: jax.Array) -> Arrays:
    """``args`` with another array at ``place``."""
    return (*args[:place], array, *args[place + 1 :])


def unused(args: Arrays) -> jax.Array:
    """Whether no token uses an entry of the bank [B]."""
    return ~(jnp.arange(args[A].shape[0])[:, None] == args[ADAPTER]).any(axis=1)


@pytest.mark.parametrize("shape", every_other(TEST_SHAPES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend: str, shape: Shape) -> None:
    args = make_args(shape)
    assert worst(shape, args, multiplied(shape, args, backend)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TEST_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend: str, shape: Shape) -> None:
    test_backend(backend, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape: Shape) -> None:
    """An H200's tiles, and all of K; columns and tiles of tokens are independent, so one and a half will do."""
    tiles = tiles_for(shape, "h200")
    tokens = min(shape.tokens, 96 if shape.phase == "decode" else 300)
    width = tiles.tile_n * 3 // 2 // shape.modules
    shape = replace(shape, tokens=tokens, n=width * shape.modules, segments=(width,) * shape.modules)
    args = make_args(shape)
    assert worst(shape, args, multiplied(shape, args, "pallas_triton", tiles)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes_on_a_gpu(shape: Shape) -> None:
    test_real_shapes(shape)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    tokens=st.sampled_from((1, 17, 65, 257)),
    k=st.sampled_from((8, 40, 256)),
    n=st.sampled_from((8, 40, 64)),
    rank=st.sampled_from((16, 48, 80)),
    slots=st.sampled_from((2, 4)),
    layers=st.sampled_from((1, 3)),
    mixed=st.booleans(),
    segments=st.sampled_from((None, (8,), (3, 5), (4, 1, 3))),
    dtype=st.sampled_from(("bfloat16", "float32")),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(
    tokens: int,
    k: int,
    n: int,
    rank: int,
    slots: int,
    layers: int,
    mixed: bool,
    segments: tuple[int, ...] | None,
    dtype: str,
    seed: int,
) -> None:
    shape = Shape("any", tokens, k, n, rank, slots, layers, mixed, dtype, segments)
    args = make_args(shape, seed)
    for backend in complete(BACKENDS):
        assert worst(shape, args, multiplied(shape, args, backend)) < 1


@pytest.mark.parametrize("shape", [MIXED, WHOLE], ids=str)
@pytest.mark.parametrize(
    "tiles",
    [Tiles(16, 16, 32, 1, 1, 4, 2), Tiles(32, 64, 64, 2, 3, 4, 3), Tiles(16, 32, 128, 8, 16, 4, 3)],
    ids=str,
)
def test_tiles_change_nothing(tiles: Tiles, shape: Shape) -> None:
    args = make_args(shape)
    assert worst(shape, args, multiplied(shape, args, "pallas_triton", tiles)) < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_no_token_uses_are_not_read(backend: str) -> None:
    args = make_args(MIXED)
    spoilt = args
    for place in (A, B):
        spoilt = changed(spoilt, place, jnp.where(unused(args)[:, None, None], jnp.nan, spoilt[place]))
    assert unused(args).sum() > MIXED.slots
    np.testing.assert_array_equal(multiplied(MIXED, spoilt, backend), multiplied(MIXED, args, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_that_overflows_harms_its_own_tokens_alone(backend: str) -> None:
    args = make_args(MIXED)
    bad = args[ADAPTER][0]
    got = multiplied(MIXED, changed(args, A, args[A].at[bad].set(jnp.inf)), backend)
    own = np.asarray(args[ADAPTER] == bad)
    assert not np.isfinite(got[own]).any()
    np.testing.assert_array_equal(got[~own], multiplied(MIXED, args, backend)[~own])


def test_ranks_that_an_adapter_does_not_have_are_not_read() -> None:
    args = make_args(MIXED)
    beyond = jnp.arange(MIXED.rank) >= -(-args[RANKS][:, None] // 16) * 16
    of_modules = jnp.tile(beyond, len(MIXED.segments or ()))
    spoilt = changed(args, A, jnp.where(of_modules[:, None], jnp.nan, args[A]))
    spoilt = changed(spoilt, B, jnp.where(beyond[..., None], jnp.nan, spoilt[B]))
    assert beyond.any()
    np.testing.assert_array_equal(multiplied(MIXED, spoilt, "pallas_triton"), multiplied(MIXED, args, "pallas_triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_an_adapter_are_zero(backend: str) -> None:
    args = make_args(MIXED)
    got = multiplied(MIXED, args, backend)
    without = np.asarray(args[ADAPTER]) < 0
    assert without.any()
    assert not got[without].any()
    assert got[~without].any(axis=1).all()
    for nobody in (args[ADAPTER] * 0 - 1, args[ADAPTER] * 0 - 15):
        assert not multiplied(MIXED, changed(args, ADAPTER, nobody), backend).any(), "none has one"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_candidates_changes_nothing(backend: str) -> None:
    args = make_args(MIXED)
    turned = changed(args, CANDIDATES, args[CANDIDATES][::-1])
    np.testing.assert_array_equal(multiplied(MIXED, turned, backend), multiplied(MIXED, args, backend))


def test_under_shard_map() -> None:
    """Columns of the result spread over devices; what is in the bank, and who uses it, is only known when it runs."""
    shape = replace(MIXED, dtype="float32", segments=(10, 5, 3))
    args = make_args(shape)
    everywhere, columns = PartitionSpec(), PartitionSpec(None, None, "tp")
    spread = jax.shard_map(
        lambda *arrays: lora_matmul(LoRAMatmulCall(*arrays, segments=shape.segments), backend="reference"),
        mesh=Mesh(np.array(jax.devices()[:4]), ("tp",)),
        in_specs=(everywhere, everywhere, columns, *[everywhere] * 3),
        out_specs=PartitionSpec(None, "tp"),
        check_vma=False,
    )
    assert worst(shape, args, np.asarray(jax.jit(spread)(*args), np.float64)) < 1


def shift(place: int, axis: int) -> Callable[[Arrays], Arrays]:
    """The argument off by one along ``axis``."""

    def mutate(args: Arrays) -> Arrays:
        return changed(args, place, jnp.roll(args[place], 1, axis))

    mutate.__name__ = f"shift_{('x', 'a', 'b', 'adapter')[place]}_{axis}"
    return mutate


def forget_last_of_k(args: Arrays) -> Arrays:
    return changed(args, X, args[X].at[:, -1].set(0))


def forget_last_rank(args: Arrays) -> Arrays:
    return changed(args, B, args[B].at[:, args[RANKS].min() - 1].set(0))


def forget_an_adapter(args: Arrays) -> Arrays:
    return changed(args, ADAPTER, args[ADAPTER].at[0].set(-1))


MIXEDIFTS = [
    shift(X, 0),
    shift(X, 1),
    shift(A, 0),
    shift(A, 1),
    shift(A, 2),
    shift(B, 0),
    shift(B, 1),
    shift(B, 2),
    shift(ADAPTER, 0),
]


@pytest.mark.parametrize(
    "mutate", [*MIXEDIFTS, forget_last_of_k, forget_last_rank, forget_an_adapter], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_input_is_noticed(backend: str, mutate: Callable[[Arrays], Arrays]) -> None:
    args = make_args(MIXED)
    assert worst(MIXED, args, multiplied(MIXED, mutate(args), backend)) > 5


def test_teams_and_splits_leave_work_for_each_program() -> None:
    decode = ProblemSize(16, 4096, 6144, 16, 8, "bfloat16")
    assert heuristic(decode, 132) == Tiles(16, 128, 128, 16, 8, 4, 3)
    assert heuristic(replace(decode, tokens=1), 132) == Tiles(16, 128, 32, 16, 1, 4, 3), "one adapter needs no teams"
    assert heuristic(replace(decode, tokens=256), 132).tile_m == 64
    assert heuristic(replace(decode, tokens=64, rank=64), 132).splits == 4, "the registers hold no more"
    assert heuristic(replace(decode, tokens=64, n=28672), 132).splits == 8, "the sums are read 224 times"
    assert heuristic(replace(decode, tokens=4096), 132) == Tiles(128, 128, 128, 8, 1, 8, 3)
    assert heuristic(replace(decode, tokens=512), 132) == Tiles(64, 128, 128, 8, 2, 4, 3)
    assert heuristic(replace(decode, k=40), 132).tile_k == 64


def test_every_real_shape_has_candidates() -> None:
    for shape in SHAPES:
        tiles = list(candidates_for(shape))
        assert len(tiles) == len(set(tiles)) > 4


def test_what_the_kernel_refuses() -> None:
    args = tuple(map(jnp.zeros, ((1, 32), (2, 32, 8), (2, 8, 16))))
    numbers = tuple(jnp.zeros(size, jnp.int32) for size in (1, 4, 2))
    with pytest.raises(NoBackendError, match="needs R in steps of 16, have R=8; pad a and b with zeros"):
        lora_matmul(LoRAMatmulCall(*args, *numbers, segments=None), backend="pallas_triton")


FITTING = ((3, 32), (2, 32, 8), (2, 8, 16), (3,), (4,), (2,))


@pytest.mark.parametrize(
    ("place", "shape", "told"),
    [
        (X, (3, 16), r"x \(3, 16\), a \(2, 32, 8\) and b \(2, 8, 16\) do not fit"),
        (A, (2, 32, 16), "do not fit; expected"),
        (B, (1, 8, 16), "do not fit; expected"),
        (B, (8, 16), "do not fit; expected"),
        (ADAPTER, (2,), r"adapter int32\(2,\) does not fit .* int32 \[T\]"),
        (CANDIDATES, (2, 2), r"candidates int32\(2, 2\) does not fit .* int32 \[S\]"),
        (RANKS, (3,), r"ranks int32\(3,\) does not fit .* int32 \[B\]"),
    ],
)
def test_shapes_that_do_not_fit(place: int, shape: tuple[int, ...], told: str) -> None:
    shapes = (*FITTING[:place], shape, *FITTING[place + 1 :])
    x, a, b, *numbers = (jnp.zeros(s, jnp.float32 if i < ADAPTER else jnp.int32) for i, s in enumerate(shapes))
    with pytest.raises(ValueError, match=told):
        lora_matmul(LoRAMatmulCall(x, a, b, *numbers, segments=None))


@pytest.mark.parametrize(
    ("segments", "told"),
    [
        ((3,), r"segments=\(3,\) must repeat along N=16; give the width of each module's columns"),
        ((), r"expected \[T, K\], \[B, K, M·R\] and \[B, R, N\] of M=0"),
        ((8, 8), r"do not fit; expected .* of M=2"),
        ((-16,), r"segments=\(-16,\) must repeat"),
    ],
)
def test_segments_that_do_not_fit(segments: tuple[int, ...], told: str) -> None:
    x, a, b, *numbers = (jnp.zeros(s, jnp.float32 if i < ADAPTER else jnp.int32) for i, s in enumerate(FITTING))
    with pytest.raises(ValueError, match=told):
        lora_matmul(LoRAMatmulCall(x, a, b, *numbers, segments=segments))


def test_dtypes_that_do_not_fit() -> None:
    x, a, b, adapter, candidates, ranks = (
        jnp.zeros(shape, jnp.float32 if place < ADAPTER else jnp.int32) for place, shape in enumerate(FITTING)
    )
    with pytest.raises(ValueError, match="b bfloat16 must be floats of one dtype; cast them"):
        lora_matmul(LoRAMatmulCall(x, a, b.astype(jnp.bfloat16), adapter, candidates, ranks))
    with pytest.raises(ValueError, match="ranks float32"):
        lora_matmul(LoRAMatmulCall(x, a, b, adapter, candidates, ranks.astype(jnp.float32)))
