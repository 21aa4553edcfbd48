"""Products with 4-bit weights: every backend against float64, and the layouts that weights come in."""

from __future__ import annotations

import functools
import re
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
from pallas_kernels.w4a16_matmul import BACKENDS, packing, shapes, w4a16_matmul
from pallas_kernels.w4a16_matmul.dequant import ptx
from pallas_kernels.w4a16_matmul.shapes import SHAPES, TEST_SHAPES, Shape, make_args
from pallas_kernels.w4a16_matmul.tiles import Tiles

Array = np.ndarray[Any, Any]

ON_CPU = [name for name in BACKENDS if name != "pallas_mosaic_gpu"]


def weight_of(packed: Array) -> Array:
    """The weight float64 [K, N], word by word as the layout is described."""
    chunks, rows, n = packed.shape
    words = packed.astype(np.int64) & 0xFFFFFFFF
    size = 128 // (rows - 16)
    weight = np.zeros((chunks * 128, n))
    for chunk, row in np.ndindex(chunks, 128):
        q = words[chunk, row % 16] >> 4 * (row // 16) & 15
        meta = words[chunk, 16 + row // size]
        scale = (meta & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
        weight[chunk * 128 + row] = (q - (meta >> 16)) * scale
    return weight


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


@functools.partial(jax.jit, static_argnames=("backend", "tiles"))
def multiply(*args: jax.Array, backend: str | None = None, tiles: Tiles | None = None) -> jax.Array:
    return w4a16_matmul(*args, backend=backend, tiles=tiles)


@pytest.mark.parametrize("shape", TEST_SHAPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_backend(shape: Shape, backend: str) -> None:
    args, _ = make_args(shape)
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
    args, _ = make_args(replace(CUT, m=m))
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
    args, _ = make_args(Shape("", m, 128 * chunks, n, group_size, dtype), seed)
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
    args, _ = make_args(shape)
    assert excess(multiply(*args, backend="pallas_triton", tiles=tiles), args, shape.dtype, "pallas_triton") < 1


def test_float32_where_xla_computes() -> None:
    args, _ = make_args(replace(CUT, dtype="float32"))
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
    args, _ = make_args(replace(CUT, group_size=64))
    arrays = [np.array(array) for array in args]
    MUTATIONS[mutation](arrays)
    assert excess(multiply(*map(jnp.asarray, arrays), backend=backend), args, CUT.dtype, backend) > 3


def execute(asm: str, operands: list[Array], dtype: str) -> Array:
    """Run straight-line PTX on arrays of 32-bit registers: ``operands`` are $1, $2 …, the result is $0."""
    registers = {f"${index}": word for index, word in enumerate(operands, 1)}

    def value(text: str) -> Array:
        return registers[text] if text in registers else np.full_like(operands[0], int(text, 0))

    for line in filter(None, (line.strip(" {}\n") for line in asm.split(";"))):
        opcode, target, *texts = re.split(r"[\s,]+", line)
        if opcode != ".reg":
            registers[target] = instruction(opcode, [value(text) for text in texts], dtype)
    return registers["$0"]


def instruction(opcode: str, words: list[Array], dtype: str) -> Array:
    """One PTX instruction, as CUDA's PTX ISA describes it."""
    match opcode, words:
        case "mov.b32", [a]:
            return a
        case "or.b32", [a, b]:
            return a | b
        case "shr.u32", [a, b]:
            return a >> b
        case "prmt.b32", [a, b, selector]:
            pool = [word >> np.uint32(8 * place) & np.uint32(255) for word in (a, b) for place in range(4)]
            picks = [int(selector[0]) >> 4 * place & 7 for place in range(4)]
            return gathered([pool[pick] << np.uint32(8 * place) for place, pick in enumerate(picks)])
        case "lop3.b32", [a, b, c, table]:
            cases = [(x, y, z) for x in (~a, a) for y in (~b, b) for z in (~c, c)]
            chosen = [x & y & z for index, (x, y, z) in enumerate(cases) if int(table[0]) >> index & 1]
            return gathered(chosen)
        case "fma.rn.bf16x2" | "fma.rn.f16x2", [a, b, c]:
            assert (opcode == "fma.rn.f16x2") == (dtype == "float16")
            exact = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
            low, high = exact.astype(jnp.dtype(dtype)).view(np.uint16).astype(np.uint32)
            return np.asarray(low | high << np.uint32(16))
    raise NotImplementedError(opcode)


def gathered(words: list[Array]) -> Array:
    return functools.reduce(np.bitwise_or, words)


def halves(words: Array, dtype: str) -> Array:
    """The two floats of each word: float64 [2, ...], the low one first."""
    both = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)])
    return both.astype(np.uint16).view(jnp.dtype(dtype)).astype(np.float64)


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
        for tiles in (shapes.tiles_for(shape, device), *shapes.candidates_for(shape)):
            assert shape.n % tiles.tile_n == 0
            assert 1 <= tiles.split_k <= shape.k // 128
    few = [shapes.tiles_for(replace(SHAPES[0], m=m), device) for m in range(1, 17)]
    assert len(set(few)) == 1, "the sums of a sequence do not depend on how few it shares a step with"


def test_bars_are_the_four_products_of_llama_8b() -> None:
    bars = {(shape.m, shape.k, shape.n) for shape in SHAPES if shape.bar}
    sizes = {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)}
    assert bars == {(m, *size) for m in (1, 16) for size in sizes}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cost_and_key_of_real_shapes(shape: Shape) -> None:
    arrays: Any = jax.eval_shape(lambda: make_args(shape)[0])
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
    args, _ = make_args(Shape("", 1, 256, 64))
    with pytest.raises(ValueError, match="tile_n must divide N"):
        w4a16_matmul(*args, backend="pallas_triton", tiles=tiles)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [(Shape("", 1, 128, 24), "multiple of 16 columns, have N=24"), (Shape("", 1, 128, 32, dtype="float32"), "float32")],
)
def test_triton_refuses(shape: Shape, reason: str) -> None:
    args, _ = make_args(shape)
    with pytest.raises(NoBackendError, match=reason):
        w4a16_matmul(*args, backend="pallas_triton")
    assert excess(w4a16_matmul(*args), args, shape.dtype, "xla") < 1, "another backend does it"


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
    assert packing.group_size(packed.shape) == stored
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
