"""A tiny random decoder and engines over it; they share a runner for each ``tp``, so programs are compiled once."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.buckets import ROW_LENGTH, StepShape, draft_shapes
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.step import DeviceState
from jaxdeploy.engine.device.step_plan import StepPlan
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.speculation.draft import DraftProposer
from jaxdeploy.engine.speculation.gate import Gate
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.engine.speculation.speculation import Proposer, Speculation
from jaxdeploy.messages import FinishReason, Request, SamplingParams, StepOutput
from jaxdeploy.models.attention import AttentionConfig
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder, abstract_params, decoder_from
from jaxdeploy.models.dense import DenseDecoder
from jaxdeploy.models.layer import LayerConfig
from jaxdeploy.models.rope import RopeConfig
from jaxdeploy.models.weights import ParamPath
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.parallel.sharding import sharding_of

Array = np.ndarray[Any, Any]

VOCAB = 96
SESSION_LEN = 128
BLOCK_SIZE = 16
SLOTS = 16
TABLE_LENGTH = SESSION_LEN // BLOCK_SIZE
MAX_PREFILL = 64
SHAPES = [
    StepShape(decodes, prefill, TABLE_LENGTH, SLOTS)
    for decodes, prefill in ((1, 0), (4, 0), (SLOTS, 0), (0, 32), (SLOTS, MAX_PREFILL))
]
"""Fewer than ``step_shapes`` lists, so that few programs are compiled; every batch still fits one."""
IN_A_ROW = 3
SHAPES_IN_A_ROW = [*SHAPES, *(StepShape(decodes, 0, TABLE_LENGTH, SLOTS, IN_A_ROW) for decodes in (1, SLOTS))]
"""For engines that decode several tokens in a launch."""
GUESSES = 4
GUESSING = [StepShape(decodes, 0, TABLE_LENGTH, SLOTS, drafts=GUESSES) for decodes in (1, SLOTS)]
"""Beside the others for engines that guess."""

CONFIG = DenseDecoder(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=64,
    norm_eps=1e-5,
    max_position=256,
    rope=RopeConfig(),
    windows=(None, 40),
).model_config()


def changed(config: ModelConfig, **fields: Any) -> ModelConfig:
    """``config`` with other fields of ``DenseDecoder``."""
    first = config.layers[0]
    assert isinstance(first, LayerConfig)
    attention, own = first.attention, vars(config)
    flat = DenseDecoder(
        **{name: value for name, value in own.items() if name != "layers"},
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=first.mlp.intermediate_size,
        rope=attention.rope,
        windows=windows_of(config),
        qkv_bias=attention.qkv_bias,
        o_bias=attention.o_bias,
        mlp_bias=first.mlp.bias,
    )
    if "num_layers" in fields and "windows" not in fields:
        fields["windows"] = (None,) * fields["num_layers"]
    return replace(flat, **fields).model_config()


def attention_of(config: ModelConfig) -> AttentionConfig:
    """The attention of all layers, which differ in their windows only."""
    layer = config.layers[0]
    assert isinstance(layer, LayerConfig)
    return layer.attention


def windows_of(config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer."""
    return tuple(layer.attention.window for layer in config.layers if isinstance(layer, LayerConfig))


SMALLER = changed(CONFIG, num_layers=1, windows=(None,))
"""SpeculationCounts for the other, and is right where that is easy."""


class LastingRunner(ModelRunner):
    """One that outlives the engines over it."""

    def close(self) -> None:
        """Other tests go on with it."""


def params(config: ModelConfig = CONFIG, tp: int = 1) -> dict[ParamPath, jax.Array]:
    """Random weights, large enough that logits differ by far more than rounding; placed as an engine places them."""
    random, mesh = np.random.default_rng(0), make_mesh(tp)
    made = {}
    for path, param in abstract_params(config, jnp.dtype(jnp.float32)).items():
        shape = param.get_value().shape
        value = 1.0 + 0.1 * random.standard_normal(shape) if path[-1] == "scale" else _matrix(random, path, shape)
        made[path] = jax.device_put(value.astype(np.float32), sharding_of(mesh, param.axes, shape))
    return made


def _matrix(random: np.random.Generator, path: ParamPath, shape: Sequence[int]) -> Array:
    attention = attention_of(CONFIG)
    inputs = {"wo": attention.num_heads * attention.head_dim, "table": 1}.get(str(path[-1]), shape[0])
    matrix: Array = random.standard_normal(shape) * 2.0 / np.sqrt(inputs)
    return matrix


def runner_of(
    kind: type[ModelRunner],
    tp: int = 1,
    config: ModelConfig = CONFIG,
    bits: int | None = None,
    model: Decoder | None = None,
    **options: Any,
) -> ModelRunner:
    """A new runner of ``model`` (default: a new decoder of ``config``) with pools for whole sessions in every slot."""
    decoder = model or decoder_from(config, params(config, tp))
    mesh, layouts, dtype = make_mesh(tp), decoder.cache_layouts, CacheDtype(jnp.dtype(jnp.float32), bits)
    sizes = EngineConfig(block_size=BLOCK_SIZE)
    plan = plan_cache(layouts, sizes, mesh, session_len=SESSION_LEN, max_batch_size=SLOTS, dtype=dtype)
    pools = allocate_pools(layouts, plan, mesh, dtype)
    return kind(decoder, StepPlan(mesh), DeviceState.of(pools, SLOTS, SESSION_LEN, mesh), **options)


@functools.cache
def lasting_runner(tp: int, config: ModelConfig = CONFIG) -> ModelRunner:
    """The one that the tests of a session share."""
    return runner_of(LastingRunner, tp, config)


class AlwaysOpen(Gate):
    """Has every step try, however long it takes."""

    def is_open(self, batch: int) -> bool:
        """Always."""
        return True


def guessing(method: str, tp: int = 1, gate: Gate | None = None) -> Speculation:
    """Who guesses: ``ngram``, ``draft`` (``SMALLER``), or ``itself``, the same model, which is always right."""
    proposer: Proposer = NgramProposer()
    if method != "ngram":
        shapes = draft_shapes(SLOTS, MAX_PREFILL, TABLE_LENGTH, GUESSES)
        few = [shape for shape in shapes if shape.decodes in (0, 1, SLOTS)]
        runner = lasting_runner(tp, SMALLER) if method == "draft" else runner_of(ModelRunner, tp)
        proposer = DraftProposer(runner, few, VOCAB, GUESSES)
    return Speculation(proposer, GUESSES, gate or AlwaysOpen())


def tiny_engine(
    *,
    blocks: int = SLOTS * TABLE_LENGTH,
    max_prefill: int = MAX_PREFILL,
    batch: int = SLOTS,
    tp: int = 1,
    shapes: list[StepShape] = SHAPES,
    runner: ModelRunner | None = None,
    sharing: bool = True,
    host_blocks: int = 0,
    decode_steps: int = 1,
    grammars: Any = None,
    adapters: Adapters | None = None,
    reader: Any = None,
    speculation: Speculation | None = None,
) -> Engine:
    """A new engine over the shared runner: its own scheduler, slots and blocks."""
    manager = BlockManager(blocks)
    scheduler = Scheduler(
        manager,
        PrefixCache(manager, BLOCK_SIZE, SESSION_LEN if sharing else 0, host_blocks),
        SchedulerLimits(
            block_size=BLOCK_SIZE,
            max_batch_size=batch,
            max_prefill_tokens=max_prefill,
            max_mixed_tokens=max_prefill + batch,
            row_length=ROW_LENGTH,
            session_len=SESSION_LEN,
            decode_steps=decode_steps,
        ),
        adapters,
    )
    every = [*shapes, *GUESSING] if speculation else shapes
    return Engine(scheduler, runner or lasting_runner(tp), every, VOCAB, grammars, speculation, reader)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(np.random.default_rng((seed, length)).integers(0, VOCAB, length).tolist())


def request(name: str, prompt_ids: Iterable[int], **sampling: Any) -> Request:
    """A request with 16 new tokens unless ``sampling`` says otherwise."""
    return Request(name, tuple(prompt_ids), SamplingParams(**{"max_new_tokens": 16, **sampling}))


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Generate for all ``requests`` together: name → tokens."""
    collected = outputs_of(engine, requests)
    return {name: [token for output in outputs for token in output.token_ids] for name, outputs in collected.items()}


def run_one(engine: Engine, prompt_ids: Iterable[int], **sampling: Any) -> list[int]:
    """Tokens generated for one prompt."""
    return run(engine, [request("one", prompt_ids, **sampling)])["one"]


def outputs_of(engine: Engine, requests: Iterable[Request]) -> dict[str, list[StepOutput]]:
    """All outputs by request; afterwards the engine holds nothing."""
    collected: dict[str, list[StepOutput]] = {}
    for item in requests:
        engine.add(item)
        collected[item.request_id] = []
    while engine.has_work:
        for output in engine.step():
            collected[output.request_id].append(output)
        engine.scheduler.blocks.check()
    assert engine.scheduler.blocks.active == 0
    return collected


def reasons(outputs: Mapping[str, list[StepOutput]]) -> dict[str, FinishReason | None]:
    """Why each ended."""
    return {name: steps[-1].finish_reason for name, steps in outputs.items()}


def live_arrays() -> int:
    """Arrays that somebody holds; not what other tests have left to the garbage collector."""
    gc.collect()
    return len(jax.live_arrays())


@functools.cache
def dense_decoder() -> Decoder:
    """The same weights without a cache."""
    return decoder_from(CONFIG, params())


@functools.cache
def _dense() -> Any:
    return jax.jit(dense_decoder().__call__)


def dense_logits(token_ids: Sequence[int]) -> Array:
    """Logits [T, V] of the whole sequence at once, without cache or paging. One compiled length serves all."""
    padded = np.zeros((1, SESSION_LEN), np.int32)
    padded[0, : len(token_ids)] = token_ids
    return np.asarray(_dense()(padded))[0, : len(token_ids)]


def dense_greedy(prompt_ids: Sequence[int], count: int) -> list[int]:
    """``count`` greedy tokens, every one from the whole sequence."""
    tokens = list(prompt_ids)
    for _ in range(count):
        tokens.append(int(dense_logits(tokens)[-1].argmax()))
    return tokens[len(prompt_ids) :]
