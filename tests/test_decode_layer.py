"""A decode layer against float64 numpy, what it writes against the reference, and steps of several layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_step import StepOptions, StepParams, decode_step, jitted_layer, partition, sharded_decode_step
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.decode_layer import DecodeLayerCall, LayerWeights, ScoreOptions, decode_layer, padded_rows
from pallas_kernels.decode_layer.shapes import SHAPES, TEST_SHAPES, Shape, make_call, tiles_for
from pallas_kernels.decode_layer.tiles import Tiles, candidates, fits, heuristic
from pallas_kernels.dispatch import NoBackendError
from pallas_kernels.kv_pool import Pool, QuantizedPool, dequantize, pool_bits
from pallas_kernels.numerics import ACCUMULATOR, unit_roundoff
from pallas_kernels.target import Target, current_target
from pallas_kernels.w4a16_matmul.reference import weight as unpacked

Array = np.ndarray[Any, Any]

SHAPE = {shape.model: shape for shape in TEST_SHAPES}


def edge_positions(shape: Shape) -> Array:
    """New tokens at the edges of blocks and of the table, at the very beginning, and in a row that has none."""
    size, last = shape.block_size, shape.entries * shape.block_size - 1
    edges = [size, last, 0, -1, size - 1, size + 1, 2, 2 * size - 1, last // 2]
    return np.resize(np.array([edge for edge in edges if edge <= last]), shape.tokens).astype(np.int32)


@cache
def case(name: str) -> DecodeLayerCall:
    """A call of a test shape, with positions at edges; what turns the vectors is that of others, which is as good."""
    shape = SHAPE[name]
    call: DecodeLayerCall = jax.jit(lambda: make_call(shape))()
    return replace(call, positions=jnp.asarray(edge_positions(shape)))


def run(call: DecodeLayerCall, backend: str, tiles: Tiles | None = None) -> tuple[Array, Array, Pool]:
    x, normed, pool = jitted_layer(call, backend=backend, tiles=tiles)
    return np.asarray(x, np.float64), np.asarray(normed, np.float64), pool


def matrix(weight: jax.Array) -> Array:
    return np.asarray(unpacked(weight) if weight.dtype == jnp.int32 else weight, np.float64)


def elements(pool: Pool, head_dim: int) -> Array:
    """[P, 2, K, S, H]."""
    if not isinstance(pool, QuantizedPool):
        return np.asarray(pool, np.float64)
    bits = pool_bits(pool, head_dim) or 0
    return np.asarray(dequantize(pool.values, jnp.swapaxes(pool.scales, -1, -2), bits), np.float64)


def exact(call: DecodeLayerCall, written: Pool) -> tuple[Array, Array]:
    """The layer in float64, with keys and values as they are in the pool ``written``; rows that have a token."""
    weights, tables, positions, window = call.weights, call.block_tables, call.positions, call.scores.window
    count, size = call.tokens, call.heads.size
    stream, normed = (np.asarray(rows, np.float64)[:count] for rows in (call.x, call.normed))
    biases = {
        name: 0.0 if getattr(weights, name) is None else np.asarray(getattr(weights, name), np.float64)
        for name in ("bqkv", "bo", "gate_up_bias", "down_bias")
    }
    pool = elements(written, size)
    kv_heads, block = pool.shape[2], pool.shape[3]
    q = (normed @ matrix(weights.wqkv) + biases["bqkv"]).reshape(count, kv_heads, -1, size)[:, :, :-2]
    low, high = np.split(q, 2, axis=-1)
    cos, sin = (np.asarray(table, np.float64)[:, None, None] for table in (call.cos, call.sin))
    q = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    out = np.zeros(q.shape)
    for row, head in np.ndindex(count, kv_heads):
        position = int(positions[row])
        first = 0 if window is None else max(0, position - window + 1)
        places = [(int(tables[row, p // block]), p % block) for p in range(first, position + 1)]
        if places:
            keys, values = (np.stack([pool[b, half, head, o] for b, o in places]) for half in (0, 1))
            scores = q[row, head] @ keys.T * call.scores.scale
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row, head] = shares / shares.sum(axis=1, keepdims=True) @ values

    def rms(rows: Array, scale: jax.Array) -> Array:
        deviation = np.sqrt((rows**2).mean(axis=1, keepdims=True) + call.eps)
        scaled: Array = rows / deviation * np.asarray(scale, np.float64)
        return scaled

    stream = stream + out.reshape(count, -1) @ matrix(weights.wo) + biases["bo"]
    gate, up = np.split(rms(stream, weights.mlp_norm) @ matrix(weights.gate_up) + biases["gate_up_bias"], 2, axis=1)
    stream = stream + gate / (1 + np.exp(-gate)) * up @ matrix(weights.down) + biases["down_bias"]
    return stream, rms(stream, call.next_norm)


def far(got: Array, want: Array, dtype: str, layers: int = 1) -> Array:
    """Which elements are further from ``want`` than rounding explains.

    An element is what was there plus two branches, each a sum of hundreds of products. On its way a product is rounded
    six times at most (norm, projection, rotation, weight of attention, attention or activation; values count for one),
    which grows the error of a sum by the root of six, and the sums themselves are rounded twice. A branch is no larger
    than the result, whose deviation stands for it; five deviations leave room for the largest of thousands.
    """
    unit = unit_roundoff(dtype)
    bound: Array = layers * (2 * unit * np.abs(want) + 5 * unit * math.sqrt(6) * np.std(want))
    beyond: Array = np.abs(got - want) > bound
    return beyond


def assert_layer(name: str, backend: str, tiles: Tiles | None = None) -> None:
    """Results are those of float64; the pool is that of the reference; rows without a sequence are zero."""
    call, shape, count = case(name), SHAPE[name], SHAPE[name].tokens
    x, normed, pool = run(call, backend, tiles)
    written = reference_pool(name)
    assert_same_writes(shape, call, pool, written)
    real = np.asarray(call.positions) >= 0
    for got, want in zip((x, normed), exact(call, written), strict=True):
        assert not far(got[:count], want, shape.dtype)[real].any()
        assert not got[count:].any(), "rows that pad the batch come back as zeros"
        assert np.isfinite(got[:count]).all()


@cache
def reference_pool(name: str) -> Pool:
    return run(case(name), "reference")[2]


def assert_same_writes(shape: Shape, call: DecodeLayerCall, pool: Pool, written: Pool) -> None:
    """Nothing but the new slots has changed, and those hold the reference's values.

    Sums in another order may round a key or value to its neighbour, before it is rotated with its partner and after,
    and that by one step of its quantisation. Where
    terms cancel, what float32 sums of D products are off counts: the products' absolute sum is at most the norm of a
    normed token, √D, times that of a column, 1.
    """
    before, got, want = (elements(each, shape.head_dim) for each in (call.pool, pool, written))
    slots = np.zeros(before.shape, bool)
    for row, position in enumerate(np.asarray(call.positions)):
        if position >= 0:
            slots[call.block_tables[row, position // shape.block_size], :, :, position % shape.block_size] = True
    assert np.array_equal(got[~slots], before[~slots])
    pair = np.concatenate([np.hypot(*np.split(want, 2, axis=-1))] * 2, axis=-1)
    step = 2 * unit_roundoff(shape.dtype) * (np.abs(want) + pair) + 2 * ACCUMULATOR * shape.hidden
    if isinstance(written, QuantizedPool):
        step = step.max() + np.asarray(written.scales[..., 0, :], np.float64)[..., None]
    assert (np.abs(got - want) <= step)[slots].all()
    assert (got == want)[slots].mean() > 0.98
    assert (got != before)[slots].mean() > 0.5


FAST = {"tiny": 4, "tiny 8-bit KV": 9, "tiny 4-bit KV": 1, "tiny plain": 1}
"""Shapes of the fast suite → splits of attention: together all kinds of weights and pools, and all three ways to o."""


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SHAPE)[1:])])
def test_reference(name: str) -> None:
    assert_layer(name, "reference")


@pytest.mark.parametrize(("name", "splits"), FAST.items())
def test_fused_set(name: str, splits: int) -> None:
    assert_layer(name, "pallas_triton", tiles=tiles(SHAPE[name], attend_splits=splits))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4, 9])
@pytest.mark.parametrize("name", list(SHAPE))
def test_on_a_gpu(name: str, splits: int) -> None:
    assert_layer(name, "pallas_triton", tiles=tiles(SHAPE[name], attend_splits=splits))


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 4, 9, 17])
@pytest.mark.parametrize("name", list(SHAPE))
def test_fused_set_with_any_splits(name: str, splits: int) -> None:
    changed = tiles(SHAPE[name], attend_splits=splits, qkv_splits=3, out_splits=2, down_splits=5, attend_tokens=32)
    assert_layer(name, "pallas_triton", tiles=changed)


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_fused_set_with_any_weights_and_pool(group: int | None, kv_bits: int, tokens: int) -> None:
    shape = replace(SHAPE["tiny"], model=f"{group} {kv_bits} {tokens}", group=group, kv_bits=kv_bits, tokens=tokens)
    SHAPE[shape.model] = shape
    assert_layer(shape.model, "pallas_triton", tiles=tiles(shape, attend_splits=4))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [80, 96, 256])
def test_other_head_sizes(head_dim: int) -> None:
    shape = replace(SHAPE["tiny 8-bit KV"], model=f"H = {head_dim}", head_dim=head_dim, heads=8)
    SHAPE[shape.model] = shape
    assert_layer(shape.model, "pallas_triton", tiles=tiles(shape, attend_splits=2))


@pytest.mark.slow
@pytest.mark.parametrize("real", SHAPES, ids=str)
def test_real_shapes(real: Shape) -> None:
    """An H200's tiles and splits, and all of D; KV heads, columns of the MLP and sequences are independent."""
    heads = 2 * real.heads // real.kv_heads
    shape = replace(
        real, model=f"narrow {real}", tokens=min(real.tokens, 17), heads=heads, kv_heads=2, mlp=1024, entries=4
    )
    SHAPE[shape.model] = shape
    assert_layer(shape.model, "pallas_triton", tiles=tiles_for(real, "h200"))


def tiles(shape: Shape, **fields: Any) -> Tiles:
    return replace(heuristic(current_target(), shape.problem), **fields)


def weights_changed(call: DecodeLayerCall, name: str, change: Callable[[jax.Array], jax.Array]) -> DecodeLayerCall:
    return replace(call, weights=replace(call.weights, **{name: change(getattr(call.weights, name))}))


MUTATIONS: dict[str, Callable[[DecodeLayerCall], DecodeLayerCall]] = {
    "keys and values swapped": lambda call: replace(call, pool=jax.tree.map(lambda leaf: leaf[:, ::-1], call.pool)),
    "another block": lambda call: replace(call, block_tables=jnp.roll(call.block_tables, 1, axis=1)),
    "one token fewer": lambda call: replace(call, positions=jnp.maximum(call.positions - 1, 0)),
    "turned the other way": lambda call: replace(call, sin=-call.sin),
    "gate and up swapped": lambda call: weights_changed(call, "gate_up", lambda w: jnp.roll(w, w.shape[-1] // 2, -1)),
    "no bias of o": lambda call: weights_changed(call, "bo", jnp.zeros_like),
    "no bias of qkv": lambda call: weights_changed(call, "bqkv", jnp.zeros_like),
    "no bias of gate and up": lambda call: weights_changed(call, "gate_up_bias", jnp.zeros_like),
    "no bias of down": lambda call: weights_changed(call, "down_bias", jnp.zeros_like),
    "no norm": lambda call: weights_changed(call, "mlp_norm", jnp.ones_like),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_what_would_be_wrong_is_seen(mutation: str) -> None:
    name = "tiny 4-bit KV"
    call = case(name)
    want, _ = exact(call, reference_pool(name))
    got, _, _ = run(MUTATIONS[mutation](call), "reference")
    real = np.asarray(call.positions) >= 0
    assert far(got[: len(real)], want, SHAPE[name].dtype)[real].any()


def added_to_row(row: int, change: int, weight: jax.Array) -> jax.Array:
    return weight.at[:, row].add(change)


@pytest.mark.parametrize("row", [16, 17])
def test_scale_and_zero_of_each_group_count(row: int) -> None:
    """Rows 16 and 17 of a chunk describe its two groups of 64."""
    name = "tiny 4-bit KV"
    call = case(name)
    want, _ = exact(call, reference_pool(name))
    for change in (1 << 16, 1 << 8):
        mutated = weights_changed(call, "down", partial(added_to_row, row, change))
        assert far(run(mutated, "reference")[0][: len(want)], want, SHAPE[name].dtype).any()


def test_window_is_exact_to_the_token() -> None:
    name = "tiny 8-bit KV"
    call = case(name)
    assert call.scores.window is not None
    want, _ = exact(call, reference_pool(name))
    wider, _ = exact(replace(call, scores=replace(call.scores, window=call.scores.window + 1)), reference_pool(name))
    assert far(wider, want, SHAPE[name].dtype).any()


def three_layers(name: str) -> tuple[StepParams, tuple[Pool, ...], jax.Array, tuple[jax.Array, jax.Array]]:
    """Parameters, pools, tokens and (tables, positions) of three layers with 64 words."""
    shape = SHAPE[name]
    made = [make_call(shape, seed) for seed in range(3)]
    random = np.random.default_rng(0)
    dtype = jnp.dtype(shape.dtype)
    embed, head = (
        jnp.asarray(random.standard_normal(size), dtype) for size in ((64, shape.hidden), (shape.hidden, 64))
    )
    layers: tuple[LayerWeights, ...] = tuple(call.weights for call in made)
    norms = (jnp.ones((shape.hidden,), dtype), *(call.next_norm for call in made))
    tokens = jnp.asarray(random.integers(0, 64, shape.tokens), jnp.int32)
    rest = made[0].block_tables, jnp.asarray(edge_positions(shape))
    return StepParams(embed, layers, norms, head), tuple(call.pool for call in made), tokens, rest


def step(name: str, **options: Any) -> tuple[Array, list[Array]]:
    """(tokens, pools) of a step over three layers."""
    params, pools, tokens, (tables, positions) = three_layers(name)
    size = SHAPE[name].head_dim
    found, written = decode_step(StepOptions(size, **options), params, pools, tokens, positions, tables)
    return np.asarray(found), [elements(pool, size) for pool in written]


def test_layers_follow_one_another() -> None:
    """The fused set hands to the next layer what the reference does."""
    chosen = tiles(SHAPE["tiny"], attend_splits=FAST["tiny"])
    got, got_pools = step("tiny", backend="pallas_triton", tiles=chosen)
    want, want_pools = step("tiny", backend="reference")
    real = edge_positions(SHAPE["tiny"]) >= 0
    assert np.array_equal(got[real], want[real])
    for depth, (left, right) in enumerate(zip(got_pools, want_pools, strict=True), 1):
        assert not far(left, right, "bfloat16", layers=depth).any()


def test_devices_share_a_layer() -> None:
    """Two devices with half the heads and half the MLP each give the same tokens, and the same pools."""
    name = "tiny"
    params, pools, tokens, (tables, positions) = three_layers(name)
    want, want_pools = step(name, backend="reference")
    ordered = replace(params, layers=tuple(by_device(weights, 2) for weights in params.layers))
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    options = StepOptions(SHAPE[name].head_dim, backend="reference")
    sharded = sharded_decode_step(options, ordered, pools, mesh)
    got, got_pools = jax.jit(sharded)(ordered, pools, tokens, positions, tables)
    real = edge_positions(SHAPE[name]) >= 0
    assert np.array_equal(np.asarray(got)[real], want[real])
    for depth, (left, right) in enumerate(zip(got_pools, want_pools, strict=True), 1):
        assert not far(elements(left, 64), right, "bfloat16", layers=depth).any()


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2])
def test_devices_share_the_fused_set(splits: int) -> None:
    """Sums of a branch travel between devices whether they were split or not."""
    name = "tiny"
    call = case(name)
    halves = replace(call, weights=by_device(call.weights, 2), num_heads=2, axis_name="tp")
    pool_spec = P(None, None, "tp")
    specs = replace(
        jax.tree.map(lambda _: P(), halves),
        weights=partition(halves.weights, "tp"),
        pool=jax.tree.map(lambda _: pool_spec, halves.pool),
    )
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    halved = replace(SHAPE[name], heads=2, kv_heads=1, mlp=128)
    chosen = tiles(halved, out_columns=64, out_splits=splits, down_splits=1, attend_splits=2)
    run_sharded = jax.shard_map(
        partial(decode_layer, backend="pallas_triton", tiles=chosen),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P(), P(), pool_spec),
        check_vma=False,
    )
    x, _, pool = jax.jit(run_sharded)(halves)
    want, _ = exact(call, reference_pool(name))
    real = np.asarray(call.positions) >= 0
    assert not far(np.asarray(x, np.float64)[: len(real)], want, SHAPE[name].dtype)[real].any()
    assert_same_writes(SHAPE[name], call, pool, reference_pool(name))


def by_device(weights: LayerWeights, devices: int) -> LayerWeights:
    """Columns of gate and up ordered by device."""
    gate_up = weights.gate_up
    lead = gate_up.shape[:-1]
    ordered = gate_up.reshape(*lead, 2, devices, -1)
    return replace(weights, gate_up=jnp.swapaxes(ordered, -3, -2).reshape(*lead, -1))


def test_arguments_that_do_not_fit() -> None:
    call = case("tiny")
    shortened = replace(call.weights, wo=call.weights.wo[:1])
    for changed, words in (
        (replace(call, x=call.x[:3]), "must have 16 rows for 3 positions"),
        (replace(call, cos=call.cos[:2]), "must each have one row"),
        (replace(call, weights=shortened), r"weights.wo is \(128, 256\), expected \(256, 256\)"),
        (replace(call, num_heads=3), "num_heads=3 is not a multiple of the pool's 2 KV heads"),
        (replace(call, scores=ScoreOptions(0.0)), "scale=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_layer(changed)


def test_what_the_fused_set_refuses() -> None:
    call = case("tiny")
    pool, scale = call.pool, call.scores.scale
    assert not isinstance(pool, QuantizedPool)
    for changed, words in (
        (replace(call, pool=pool.astype(jnp.float16)), "takes a pool of x's dtype bfloat16"),
        (replace(call, pool=pool[:, :, :, :8]), "takes a block_size that is a power of two"),
    ):
        with pytest.raises(NoBackendError, match=words):
            decode_layer(changed, backend="pallas_triton")
    with pytest.raises(NoBackendError, match="has no tiles"):
        decode_layer(call, backend="pallas_triton", tiles=tiles(SHAPE["tiny"], out_columns=96))
    capped = replace(call, scores=ScoreOptions(scale, softcap=30.0, sinks=jnp.zeros(4)))
    with pytest.raises(NoBackendError, match="reference does not support softcap and sinks"):
        decode_layer(capped)


def test_tiles_of_real_layers() -> None:
    """Every heuristic divides its layer; whoever has many sequences needs no splits of attention."""
    for shape in SHAPES:
        for device in ("a100", "rtx4090", "h200", "b200"):
            chosen = tiles_for(shape, device)
            assert fits(chosen, shape.problem)
            assert shape.tokens < 64 or chosen.attend_splits == 1
    parallel = replace(SHAPES[0].problem, parallel=True)
    assert heuristic(Target("gpu", "x", (9, 0), 132), parallel).out_splits == 1
    assert len({replace(SHAPES[0].problem, tokens=tokens).key for tokens in (1, 5, 8, 9)}) == 3
    proposed = list(candidates(Target("gpu", "x", (9, 0), 132), SHAPES[0].problem))
    assert len(proposed) == len(set(proposed)) > 20


def test_padded_rows() -> None:
    assert [padded_rows(tokens) for tokens in (1, 16, 17, 256)] == [16, 16, 32, 256]
