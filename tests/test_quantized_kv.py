"""A quantised KV cache in the engine: against the decoder with rounded keys and values, and against itself."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.buckets import ROW_LENGTH, StepShape
from jaxdeploy.engine.device.inputs import padding_inputs
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.step import DeviceState
from jaxdeploy.engine.device.step_plan import StepPlan, plan_steps
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.messages import Request
from jaxdeploy.models import decoder as decoder_module
from jaxdeploy.models.attention import PagedContext, Rows, dense_attention
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.decoder import Decoder, abstract_params, cache_layouts, decoder_from
from jaxdeploy.models.dense import DenseDecoder
from jaxdeploy.models.model import Positions
from jaxdeploy.models.rope import PositionScheme, RopeConfig, rotated
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.dispatch import ENVIRONMENT
from pallas_kernels.kv_pool import QuantizedPool, dequantize, quantize
from pallas_kernels.score_options import ScoreOptions
from tests.selection import every_other
from tests.tiny_models import (
    BLOCK_SIZE,
    CONFIG,
    SESSION_LEN,
    SHAPES,
    SLOTS,
    VOCAB,
    Array,
    LastingRunner,
    attention_of,
    changed,
    dense_decoder,
    dense_logits,
    lasting_runner,
    live_arrays,
    outputs_of,
    params,
    prompt,
    request,
    run,
    tiny_engine,
)

LAYOUTS = cache_layouts(CONFIG)

FEW_SHAPES = [SHAPES[2], SHAPES[4]]
"""One to prefill, one to decode, so that few programs are compiled."""

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}

ROUNDING = 1 / 10
"""How much of what quantising changes two ways to the same step may differ by.

Sums in another order now and then land on the other side of a rounding: one q of thousands, by one step.
"""


def new_runner(kind: type[ModelRunner], bits: int, tp: int = 1, ranges: Any = None) -> ModelRunner:
    mesh, dtype = make_mesh(tp), CacheDtype(jnp.dtype(jnp.float32), bits)
    sizes = EngineConfig(block_size=BLOCK_SIZE)
    plan = plan_cache(LAYOUTS, sizes, mesh, session_len=SESSION_LEN, max_batch_size=SLOTS, dtype=dtype)
    pools = allocate_pools(LAYOUTS, plan, mesh, dtype, ranges)
    state = DeviceState.of(pools, SLOTS, SESSION_LEN, mesh)
    return kind(decoder_from(CONFIG, params(CONFIG, tp)), StepPlan(mesh), state)


@functools.cache
def runner_of(bits: int, tp: int) -> ModelRunner:
    return new_runner(LastingRunner, bits, tp)


INTERPRETED = changed(CONFIG, num_layers=1, windows=(None,), num_heads=2, num_kv_heads=1, head_dim=64)
"""The smallest model that the Triton kernels take."""


def short_engine(bits: int | None) -> Any:
    """An engine with blocks of the default size, so that most of a sequence's last block was never written."""
    block_size, session_len = EngineConfig().block_size, 96
    mesh, dtype = make_mesh(1), CacheDtype(jnp.dtype(jnp.float32), bits)
    sizes, layouts = EngineConfig(block_size=block_size), cache_layouts(INTERPRETED)
    plan = plan_cache(layouts, sizes, mesh, session_len=session_len, max_batch_size=2, dtype=dtype)
    pools = allocate_pools(layouts, plan, mesh, dtype)
    decoder = decoder_from(INTERPRETED, params(INTERPRETED))
    runner = ModelRunner(decoder, StepPlan(mesh), DeviceState.of(pools, 2, session_len, mesh))
    blocks = BlockManager(plan.num_blocks)
    limits = SchedulerLimits(
        block_size=block_size,
        max_batch_size=2,
        max_prefill_tokens=32,
        max_mixed_tokens=32,
        row_length=ROW_LENGTH,
        session_len=session_len,
        decode_steps=1,
    )
    scheduler = Scheduler(blocks, PrefixCache(blocks, block_size, 0, 0), limits)
    shapes = [StepShape(2, prefill, limits.blocks_for(session_len), 2) for prefill in (0, 32)]
    return Engine(scheduler, runner, shapes, VOCAB)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_the_engine_on_interpreted_kernels_generates_what_it_does_on_the_cpu(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels also read tokens of a block that were never written; those must not change anything."""
    requests = [request(str(length), prompt(length), max_new_tokens=6) for length in (5, 40)]
    run_layer: Any = decoder_module._run_layer
    replies = []
    for backend in ("", "paged_attention=pallas_triton,kv_cache_write=pallas_triton"):
        run_layer.clear_cache()  # it was traced for another backend
        monkeypatch.setenv(ENVIRONMENT, backend)
        engine = short_engine(bits)
        replies.append(run(engine, requests))
        engine.close()
    assert replies[0] == replies[1]


def engine_of(bits: int, tp: int = 1, **options: Any) -> Any:
    return tiny_engine(runner=runner_of(bits, tp), shapes=FEW_SHAPES, **options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """One whole sequence whose keys and values lose what a pool of ``bits`` loses; the pool is its ranges, if any."""

    bits: int = field(metadata={"static": True})

    def attend(self, qkv: jax.Array, scheme: PositionScheme, pool: Any, scores: ScoreOptions) -> tuple[jax.Array, Any]:
        tokens, _, _, size = qkv.shape
        q = rotated(qkv[:, :, :-2].reshape(tokens, -1, size), scheme)
        both = jnp.stack([rotated(qkv[:, :, -2], scheme), qkv[:, :, -1]])
        fixed = None if pool is None else jnp.broadcast_to(pool[:, None], (*both.shape[:-1], 2))
        k, v = dequantize(*quantize(both, self.bits, fixed), self.bits)
        return dense_attention(q[None], k[None], v[None], scores=scores).reshape(q.shape), pool


@functools.cache
def _rounded(bits: int) -> Any:
    decoder = dense_decoder()

    def logits(tokens: jax.Array, ranges: Any) -> jax.Array:
        positions = jnp.arange(SESSION_LEN, dtype=jnp.int32)
        x = decoder.embed(tokens)
        x = decoder.hidden(x, Positions(positions, positions), Rounded(bits), ranges).states
        return decoder.logits(x)

    return jax.jit(logits)


def rounded_logits(token_ids: Sequence[int], bits: int, ranges: Array | None = None) -> Array:
    padded = np.zeros(SESSION_LEN, np.int32)
    padded[: len(token_ids)] = token_ids
    layers = [None] * CONFIG.num_layers if ranges is None else [jnp.asarray(layer) for layer in ranges]
    return np.asarray(_rounded(bits)(padded, layers))[: len(token_ids)]


def logprobs_of(logits: Array) -> Array:
    result: Array = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return result


def generated(engine: Any, item: Request) -> tuple[list[int], Array]:
    """Tokens and their log-probabilities."""
    outputs = outputs_of(engine, [item])[item.request_id]
    return [step.token_ids[0] for step in outputs], np.array([step.logprobs[0].logprob for step in outputs])


def chosen(logits: Array, tokens: list[int]) -> Array:
    """Log-probabilities of the last ``tokens`` of a sequence whose ``logits`` these are."""
    rows = logprobs_of(logits)[-len(tokens) - 1 : -1]
    picked: Array = rows[np.arange(len(tokens)), tokens]
    return picked


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("length", [1, 33, 100])
def test_the_engine_is_the_decoder_with_rounded_keys_and_values(bits: int, length: int) -> None:
    tokens, logprobs = generated(engine_of(bits), request("a", prompt(length), logprobs=0))
    whole = [*prompt(length), *tokens]
    wanted = rounded_logits(whole, bits)
    assert wanted.argmax(axis=-1)[length - 1 : -1].tolist() == tokens
    truth = chosen(wanted, tokens)
    for other in (dense_logits(whole), rounded_logits(whole, 12 - bits)):
        tolerance = ROUNDING * np.abs(chosen(other, tokens) - truth).max()
        assert np.abs(logprobs - truth).max() < tolerance, "floats, or the other bits, would be noticed"


def mixed(*lengths: int, **sampling: Any) -> list[Request]:
    """Greedy and sampled requests in turn."""
    return [
        request(f"{length}", prompt(length), **(SAMPLED if index % 2 else {}), **sampling)
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("bits", every_other([8, 4]))
def test_together_is_one_by_one(bits: int) -> None:
    items = mixed(1, 16, 17, 40, 64, 100)
    together = run(engine_of(bits), items)
    for item in items:
        assert run(engine_of(bits), [item])[item.request_id] == together[item.request_id]


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_prefill_is_chunked_prefill(bits: int) -> None:
    items = mixed(100, 101)
    assert run(engine_of(bits, max_prefill=32), items) == run(engine_of(bits, max_prefill=64), items)


@pytest.mark.parametrize("bits", [8, 4])
def test_preempted_is_uninterrupted(bits: int) -> None:
    items = mixed(40, 41, 42, 43, 30, 60, max_new_tokens=30)
    engine = engine_of(bits, blocks=11)
    assert run(engine, items) == run(engine_of(bits), items)
    assert engine.scheduler.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tp", [2, 4])
def test_several_devices_generate_what_one_does(tp: int, bits: int) -> None:
    item = request("a", prompt(70), logprobs=0, **SAMPLED)
    (tokens, logprobs), (expected, truth) = (generated(engine_of(bits, n), item) for n in (tp, 1))
    assert tokens == expected
    whole = [*item.prompt_token_ids, *tokens]
    effect = chosen(dense_logits(whole), tokens) - chosen(rounded_logits(whole, bits), tokens)
    assert np.abs(logprobs - truth).max() < ROUNDING * np.abs(effect).max()
    for pool in runner_of(bits, tp)._own_state.pools:
        for array in jax.tree.leaves(pool):
            share = (*array.shape[:2], attention_of(CONFIG).num_kv_heads // tp, *array.shape[3:])
            assert [shard.data.shape for shard in array.addressable_shards] == [share] * tp


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_no_step_copies_a_pool(shape: StepShape, bits: int) -> None:
    """Values and scales are updated in place, and donated."""
    runner = runner_of(bits, 1)
    compiled, arrays = (
        runner.compiled(padding_inputs(shape, VOCAB, full_sampler=False)),
        jax.tree.leaves(runner._own_state.pools),
    )
    for array in arrays[:2]:
        dims = ",".join(map(str, array.shape))
        assert re.findall(rf"\[{dims}\]\S* parameter\(", str(compiled.as_text()))
        assert not re.findall(rf"\[{dims}\]\S* (?:copy|convert)\(", str(compiled.as_text()))
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in arrays)
    engine = engine_of(bits)
    engine.add(request("a", prompt(5)))
    engine.step()
    assert all(array.is_deleted() for array in arrays)
    engine.abort("a")


def test_close_gives_the_memory_back() -> None:
    run(engine_of(8), mixed(5))
    before = live_arrays()
    engine = tiny_engine(runner=new_runner(ModelRunner, 8), shapes=FEW_SHAPES)
    assert run(engine, mixed(5)) == run(engine_of(8), mixed(5))
    engine.close()
    assert live_arrays() == before


def parameters_of(low_high: Array) -> Array:
    """LMDeploy v0.3's: from float64 [..., 2] to scale and zero point, for integers from −128 to 127."""
    low, high = low_high[..., 0], low_high[..., 1]
    return np.stack([(high - low) / 255, (high + low) / 2], axis=-1)


@functools.cache
def own_ranges() -> tuple[Array, Array]:
    """[L, 2, 2]: lowest and highest key and value of each layer, over some prompts; and the parameters [L, K, 4]."""
    runner = lasting_runner(1)
    run(tiny_engine(), [request(f"{length}", prompt(length), max_new_tokens=1) for length in (90, 100, 111)])
    low_high = []
    for pool in runner._own_state.pools:
        both = np.moveaxis(np.asarray(pool, np.float64), 1, 0).reshape(2, -1)
        low_high.append(np.stack([both.min(axis=1), both.max(axis=1)], axis=-1))
    ranges = np.stack(low_high)
    layers = parameters_of(ranges).reshape(CONFIG.num_layers, 1, 4)
    return ranges, np.repeat(layers, attention_of(CONFIG).num_kv_heads, axis=1).astype(np.float32)


def ranges_of(parameters: Array) -> Array:
    """Scale and zero for each layer, [L, 2, K, 2]."""
    return np.stack([layout.ranges(rows) for layout, rows in zip(LAYOUTS, parameters, strict=True)])


def test_ranges_reach_from_the_lowest_to_the_highest() -> None:
    true, parameters = own_ranges()
    ranges = ranges_of(parameters).astype(np.float64)
    assert ranges.shape == (CONFIG.num_layers, 2, attention_of(CONFIG).num_kv_heads, 2)
    scale, zero = ranges[..., 0], ranges[..., 1]
    # The middle of a range is 0, so that of its 256 integers the first lies half a step outside, and the last inside.
    assert (np.abs(zero + scale / 2 - true[..., :1]) < scale / 8).all()
    assert (np.abs(zero + 255.5 * scale - true[..., 1:]) < scale / 8).all()


@pytest.mark.parametrize("tp", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_calibrated_ranges(tp: int) -> None:
    """As the decoder with keys and values rounded to those ranges; and near floats, unless the ranges are wrong."""
    _, parameters = own_ranges()
    absurd = parameters * np.array([0.02, 1, 0.02, 1], np.float32)
    worst = {}
    for name, given in (("own", parameters), ("absurd", absurd)):
        ranges = ranges_of(given)
        runner = new_runner(ModelRunner, 8, tp, ranges)
        before = [np.asarray(pool.scales) for pool in runner._own_state.pools if isinstance(pool, QuantizedPool)]
        engine = tiny_engine(runner=runner, shapes=FEW_SHAPES)
        item = request("a", prompt(100), logprobs=0, max_new_tokens=8)
        tokens, logprobs = generated(engine, item)
        whole = [*prompt(100), *tokens]
        truth, floats = chosen(rounded_logits(whole, 8, ranges), tokens), chosen(dense_logits(whole), tokens)
        worst[name] = np.abs(logprobs - floats).max()
        worst[f"int4 of {name}"] = np.abs(chosen(rounded_logits(whole, 4), tokens) - floats).max()
        assert np.abs(logprobs - truth).max() < ROUNDING * worst[name]
        after = [np.asarray(pool.scales) for pool in runner._own_state.pools if isinstance(pool, QuantizedPool)]
        np.testing.assert_array_equal(np.stack(after), np.stack(before))
        assert len(after) == CONFIG.num_layers
        engine.close()
    # 255 steps for a layer's range, where int4 has 15 for a vector's: even of vectors a quarter as wide it does better.
    assert 4 * worst["own"] < worst["int4 of own"]
    assert worst["absurd"] > 2 * worst["int4 of absurd"]


WIDE = DenseDecoder(
    vocab_size=64,
    hidden_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=256,
    norm_eps=1e-5,
    max_position=256,
    rope=RopeConfig(),
    windows=(None,),
).model_config()


@pytest.mark.parametrize("calibrated", [False, True])
def test_fused_decode_steps_leave_calibrated_pools_alone(
    calibrated: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "decode_layer=pallas_triton")
    dtype = jnp.dtype(jnp.bfloat16)
    weights = {path: param.get_value() for path, param in abstract_params(WIDE, dtype).items()}
    values, scales = jnp.zeros((4, 2, 2, 16, 64), jnp.uint8), jnp.zeros((4, 2, 2, 2, 16), jnp.float16)
    pool = QuantizedPool(values, scales, calibrated)

    shape = StepShape(1, 0, 2, 1)

    def step(weights: Any, pool: Any) -> Any:
        decoder: Decoder = decoder_from(WIDE, weights)
        one = jnp.zeros(1, jnp.int32)
        context = PagedContext((Rows(jnp.zeros((1, 2), jnp.int32), one, one + 1, 1),), one, make_mesh(1))
        return plan.forward(decoder, shape)(decoder.embed(one), Positions(one, one), context, [pool])

    with caplog.at_level(logging.INFO, "jaxdeploy"):
        plan = plan_steps(decoder_from(WIDE, weights), make_mesh(1), [pool], [shape])
    assert plan.is_fused(shape) != calibrated
    (updated,) = jax.eval_shape(step, weights, pool).pools
    assert updated.calibrated == calibrated
    refused = "run op by op: decode_layer: pallas_triton takes each key's and value's own range, not one that was"
    assert (refused in caplog.text) == calibrated
