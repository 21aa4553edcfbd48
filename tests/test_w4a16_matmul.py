"""Products with 4-bit weights: every backend against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import numerics
from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.offline.devices import DEVICES
from pallas_kernels.w4a16_matmul import BACKENDS, shapes, w4a16_matmul
from pallas_kernels.w4a16_matmul.dequant import ptx
from pallas_kernels.w4a16_matmul.shapes import SHAPES, TEST_SHAPES, Shape, make_call
from pallas_kernels.w4a16_matmul.tiles import Tiles
from tests.packed_weights import weight_of
from tests.ptx import execute, halves
from tests.selection import every_other

Array = np.ndarray[Any, Any]

ON_CPU = [name for name in BACKENDS if name != "pallas_mosaic_gpu"]


def wide(array: Any) -> Array:
    return np.asarray(array).astype(np.float64)


def excess(got: Any, args: tuple[Any, ...], dtype: str, backend: str) -> float:
    """The largest error in units of what rounding explains: a right result stays below 1.

    q - zero is exact in both dtypes and so are its products in float32: what remains are the sums, one rounding by the
    scale, and the result's. The xla backend also rounds each weight.
    """
    x, packed, *bias = args
    weight = weight_of(np.asarray(packed))
    exact, magnitude = wide(x) @ weight, np.abs(wide(x)) @ np.abs(weight)
    for term in bias:
        exact, magnitude = exact + wide(term), magnitude + np.abs(wide(term))
    rounded = numerics.unit_roundoff(dtype) if backend == "xla" else numerics.ACCUMULATOR
    bound = numerics.sum_bound(exact, magnitude, len(weight), dtype, operand_roundoff=rounded)
    return float((np.abs(wide(got) - exact) / bound).max())


def make_args(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """The arrays of a call, in the order of its fields."""
    return tuple(jax.tree.leaves(make_call(shape, seed)))


@functools.partial(jax.jit, static_argnames=("backend", "tiles"))
def multiply(*args: jax.Array, backend: str | None = None, tiles: Tiles | None = None) -> jax.Array:
    return w4a16_matmul(*args, backend=backend, tiles=tiles)


@pytest.mark.parametrize("shape", every_other(TEST_SHAPES), ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_backend(shape: Shape, backend: str) -> None:
    args = make_args(shape)
    got = multiply(*args, backend=backend)
    assert (got.shape, got.dtype) == ((shape.m, shape.n), shape.dtype)
    assert excess(got, args, shape.dtype, backend) < 1


CUT = Shape("five chunks", 16, 640, 128, bias=True)


@pytest.mark.parametrize(
    ("m", "tiles"),
    [
        (16, Tiles(16, 64, 1, 4, 4)),
        (16, Tiles(16, 64, 2, 4, 4)),
        (9, Tiles(16, 128, 3, 4, 4)),
        (33, Tiles(16, 128, 5, 4, 4)),
        (33, Tiles(64, 32, 2, 4, 4)),
        (70, Tiles(128, 64, 2, 8, 3)),
        (70, Tiles(64, 128, 1, 8, 3)),
    ],
    ids=str,
)
def test_any_tiles_give_the_product(m: int, tiles: Tiles) -> None:
    """Parts of K of different lengths, rows in several tiles with the last not full, either way round of the dots."""
    args = make_args(replace(CUT, m=m))
    assert excess(multiply(*args, backend="pallas_triton", tiles=tiles), args, CUT.dtype, "pallas_triton") < 1


@settings(max_examples=6, deadline=None)
@given(
    m=st.sampled_from([1, 5, 31]),
    chunks=st.sampled_from([1, 3]),
    n=st.sampled_from([16, 64]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(m: int, chunks: int, n: int, group_size: int, dtype: str, seed: int) -> None:
    args = make_args(Shape("", m, 128 * chunks, n, group_size, dtype), seed)
    assert excess(multiply(*args, backend="pallas_triton"), args, dtype, "pallas_triton") < 1


def narrowed() -> dict[tuple[Shape, Tiles], None]:
    """Real shapes with the tiles they have on an H200, in all of K, but only one tile of columns and two of rows."""
    found: dict[tuple[Shape, Tiles], None] = {}
    for shape in SHAPES:
        tiles = shapes.tiles_for(shape, "h200")
        found[replace(shape, model="", m=min(shape.m, tiles.tile_m + 1), n=tiles.tile_n, bar=False), tiles] = None
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "tiles"), narrowed(), ids=str)
def test_real_shapes(shape: Shape, tiles: Tiles) -> None:
    args = make_args(shape)
    assert excess(multiply(*args, backend="pallas_triton", tiles=tiles), args, shape.dtype, "pallas_triton") < 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TEST_SHAPES, ids=str)
def test_on_a_gpu(shape: Shape) -> None:
    args = make_args(shape)
    assert excess(multiply(*args, backend="pallas_triton"), args, shape.dtype, "pallas_triton") < 1


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "tiles"), narrowed(), ids=str)
def test_real_shapes_on_a_gpu(shape: Shape, tiles: Tiles) -> None:
    test_real_shapes(shape, tiles)


def test_xla_goes_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most weights at a time are what 50 columns have; 128 columns then go in four times 32."""
    monkeypatch.setattr("pallas_kernels.w4a16_matmul.xla.MAX_WEIGHTS", 50 * CUT.k)
    args = make_args(CUT)
    call = functools.partial(w4a16_matmul, backend="xla")
    assert "f32[16,32] = dot_general" in str(jax.make_jaxpr(call)(*args))
    assert excess(call(*args), args, CUT.dtype, "xla") < 1


def test_float32_where_xla_computes() -> None:
    args = make_args(replace(CUT, dtype="float32"))
    for backend in ("xla", "reference"):
        assert excess(multiply(*args, backend=backend), args, "float32", backend) < 1


def change_words(change: Callable[[Array], Array]) -> Callable[[list[Array]], None]:
    def mutate(args: list[Array]) -> None:
        packed = args[1].copy()
        packed[:, :16] = change(packed[:, :16].view(np.uint32)).view(np.int32)
        args[1] = packed

    return mutate


def change_groups(change: Callable[[Array], Array]) -> Callable[[list[Array]], None]:
    def mutate(args: list[Array]) -> None:
        packed = args[1].copy()
        packed[:, 16:] = change(packed[:, 16:])
        args[1] = packed

    return mutate


def shift_bias(args: list[Array]) -> None:
    args[2] = np.roll(args[2], 1)


MUTATIONS = {
    "two halves of a word swapped": change_words(lambda words: words << np.uint32(16) | words >> np.uint32(16)),
    "one nibble off": change_words(lambda words: words << np.uint32(4) | words >> np.uint32(28)),
    "neighbouring rows swapped": change_words(
        lambda words: words.reshape(5, 8, 2, -1)[:, :, ::-1].reshape(words.shape)
    ),
    "next chunk's words": change_words(lambda words: np.roll(words, 1, axis=0)),
    "next column": change_words(lambda words: np.roll(words, 1, axis=2)),
    "zero points one higher": change_groups(lambda meta: meta + 65536),
    "no zero points": change_groups(lambda meta: meta & 0xFFFF),
    "next group": change_groups(lambda meta: np.roll(meta, 1, axis=1)),
    "next chunk's groups": change_groups(lambda meta: np.roll(meta, 1, axis=0)),
    "bias of the next column": shift_bias,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_wrong_input_is_noticed(mutation: str, backend: str) -> None:
    args = make_args(replace(CUT, group_size=64))
    arrays = [np.array(array) for array in args]
    MUTATIONS[mutation](arrays)
    assert excess(multiply(*map(jnp.asarray, arrays), backend=backend), args, CUT.dtype, backend) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("j", range(8))
def test_assembly(j: int, dtype: str) -> None:
    """What runs on a GPU in place of the interpreted steps."""
    random = np.random.default_rng(j)
    words = random.integers(0, 2**32, (2, 500), np.uint32)
    zeros = random.integers(0, 17, 500, np.uint32)
    groups = zeros << np.uint32(16) | random.integers(0, 2**16, 500, np.uint32)
    got = halves(execute(ptx(j, dtype), [*words, groups, groups], dtype), dtype)
    expected = (words >> np.uint32(4 * j) & np.uint32(15)).astype(np.int64) - zeros.astype(np.int64)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_heuristic_fits(device: str) -> None:
    for shape in SHAPES:
        candidates = list(shapes.candidates_for(shape))
        assert 6 <= len(candidates) < 50, "enough to choose from, few enough to time"
        for tiles in (shapes.tiles_for(shape, device), *candidates):
            assert shape.n % tiles.tile_n == 0
            assert 1 <= tiles.split_k <= shape.k // 128
    for first, last in ((1, 16), (17, 32), (33, 64)):
        few = {shapes.tiles_for(replace(SHAPES[0], m=m), device) for m in range(first, last + 1)}
        assert len(few) == 1, "the sums of a sequence do not depend on how few it shares a step with"


def test_bars_are_the_four_products_of_llama_8b() -> None:
    bars = {(shape.m, shape.k, shape.n) for shape in SHAPES if shape.bar}
    sizes = {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)}
    assert bars == {(m, *size) for m in (1, 16) for size in sizes}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cost_and_key_of_real_shapes(shape: Shape) -> None:
    arrays: Any = jax.eval_shape(lambda: make_args(shape))
    size, operations = shapes.cost(shape)
    assert size == sum(array.size * array.dtype.itemsize for array in arrays) + 2 * shape.m * shape.n
    assert operations == 2 * shape.m * shape.k * shape.n
    assert shapes.key_for(shape) == shapes.key_for(replace(shape, model="another"))
    assert shapes.elements_per_trip(shape, shapes.tiles_for(shape, "h200")) == 128 * 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ((2, 128), "bfloat16")}, "K must be 128 times"),
        ({"x": ((2, 2, 128), "bfloat16")}, r"must be \[M, K\]"),
        ({"x": ((2, 256), "int32")}, r"must be \[M, K\]"),
        ({"packed": ((2, 17, 64), "uint32")}, "must be int32"),
        ({"packed": ((2, 19, 64), "int32")}, "must be int32"),
        ({"packed": ((34, 64), "int32")}, "must be int32"),
        ({"bias": ((32,), "bfloat16")}, "dtype of x"),
        ({"bias": ((64,), "float32")}, "dtype of x"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    fitting = {"x": ((2, 256), "bfloat16"), "packed": ((2, 17, 64), "int32"), "bias": ((64,), "bfloat16")}
    x, packed, bias = (jnp.zeros(*change.get(name, spec)) for name, spec in fitting.items())
    with pytest.raises(ValueError, match=message):
        w4a16_matmul(x, packed, bias)


@pytest.mark.parametrize("tiles", [Tiles(16, 128, 1, 4, 4), Tiles(16, 64, 3, 4, 4), Tiles(16, 64, 0, 4, 4)], ids=str)
def test_tiles_that_do_not_fit(tiles: Tiles) -> None:
    args = make_args(Shape("", 1, 256, 64))
    with pytest.raises(ValueError, match="tile_n must divide N"):
        w4a16_matmul(*args, backend="pallas_triton", tiles=tiles)


def test_tiles_of_another_backend() -> None:
    args = make_args(Shape("", 1, 256, 64))
    with pytest.raises(NoBackendError, match="pallas_triton takes Tiles, have 7"):
        w4a16_matmul(*args, backend="pallas_triton", tiles=7)


@pytest.mark.parametrize(("m", "masked"), [(3, 9), (16, 0), (19, 9)])
def test_only_real_rows_are_read_and_written(m: int, masked: int) -> None:
    """Padded sums would cost up to sixteen times the traffic, and on a GPU there is no memory beyond the last row: the
    eight reads of a chunk's activations and the store are masked. The interpreter would not notice."""
    args = make_args(replace(CUT, m=m))
    call = functools.partial(w4a16_matmul, backend="pallas_triton", tiles=Tiles(16, 64, 5, 4, 4))
    program = str(jax.make_jaxpr(call)(*args))
    assert f"f32[5,{m},128]" in program
    assert program.count(" mask=") == masked


@pytest.mark.parametrize(
    ("shape", "reason"),
    [(Shape("", 1, 128, 24), "multiple of 16 columns, have N=24"), (Shape("", 1, 128, 32, dtype="float32"), "float32")],
)
def test_triton_refuses(shape: Shape, reason: str) -> None:
    args = make_args(shape)
    with pytest.raises(NoBackendError, match=reason):
        w4a16_matmul(*args, backend="pallas_triton")
    assert excess(w4a16_matmul(*args), args, shape.dtype, "xla") < 1, "another backend does it"
