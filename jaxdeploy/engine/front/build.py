"""From a model's folder and an ``EngineConfig`` to a running engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxdeploy.checkpoint.model import LoadOptions, float_dtype, load_model
from jaxdeploy.checkpoint.tensor_ref import TensorRef
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.adapter_reader import EngineAdapters, adapters_of
from jaxdeploy.engine.device.buckets import ROW_LENGTH, StepShape, draft_shapes, step_shapes
from jaxdeploy.engine.device.features import Features, FeatureTap
from jaxdeploy.engine.device.kv_cache import CachePlan, Pools, allocate_pools, plan_cache
from jaxdeploy.engine.device.kv_policy import kv_policy
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.step import DeviceState
from jaxdeploy.engine.device.step_plan import plan_steps
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.limits import Limits
from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.speculation.draft import DraftProposer
from jaxdeploy.engine.speculation.draft_model import (
    DEFAULT_DRAFTS,
    DraftModel,
    find_draft_model,
    load_draft_model,
    method_of,
)
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.engine.speculation.speculation import Speculation
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.stored import user_path
from jaxdeploy.grammar.matcher import Grammars
from jaxdeploy.models import fused_decode
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.models.eagle3 import Eagle3
from jaxdeploy.models.model import Model
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import has_biased_keys, tensor_parallel
from jaxdeploy.parallel.mesh import make_mesh, on_cpu
from jaxdeploy.progress import counted
from jaxdeploy.tokenizer import Tokenizer
from pallas_kernels.dispatch import ENVIRONMENT, BackendNameError, NoBackendError, preferred

logger = logging.getLogger("jaxdeploy")

DEFAULT_SESSION_LEN = 8192
DEFAULT_CACHE_DIR = Path("~/.cache/jaxdeploy/xla")


def build_engine(
    folder: Path,
    hf: Mapping[str, Any],
    config: EngineConfig,
    *,
    ends: frozenset[int] = frozenset(),
    progress: bool = False,
) -> Engine:
    """Load the model of ``folder`` (its ``config.json`` is ``hf``) and get everything ready that a step needs.

    ``ends`` are the tokens with which replies end that follow a grammar.

    Raises ``ConfigError``, ``CheckpointError``, ``UnsupportedModelError``, ``CacheTooSmallError``.
    """
    try:
        return _build(folder, hf, config, ends, progress=progress)
    except (NoBackendError, BackendNameError) as error:
        if named := os.environ.get(ENVIRONMENT):
            raise ConfigError(f"{ENVIRONMENT}={named} does not fit: {error}; name other backends, or none") from None
        raise


def _build(
    folder: Path, hf: Mapping[str, Any], config: EngineConfig, ends: frozenset[int], *, progress: bool
) -> Engine:
    _enable_compilation_cache(config)
    model = tensor_parallel(_model_config(hf, config), config.tp)
    mesh = make_mesh(config.tp)
    limits = resolve_limits(model, config, mesh)
    policy = kv_policy(folder, cache_layouts(model), config, biased_keys=has_biased_keys(model))
    cache_dtype = CacheDtype(limits.dtype, policy.bits)
    adapters = adapters_of(family_of(hf), model, config, mesh, limits.dtype, partial(_stored_tensors, folder, config))
    draft = find_draft_model(folder, model, config)
    options = LoadOptions(limits.dtype, config.model_format, config.load_format, _outputs_first(mesh), progress)
    decoder = load_model(folder, hf, mesh, options, model)
    draft_model = load_draft_model(
        draft, decoder, config, mesh, limits.dtype, outputs_first=_outputs_first(mesh), progress=progress
    )
    plan = plan_cache(
        decoder.cache_layouts,
        config,
        mesh,
        session_len=limits.session_len,
        max_batch_size=limits.max_batch_size,
        dtype=cache_dtype,
        draft_layouts=draft_model.cache_layouts if draft_model else (),
    )
    logger.info("%s", plan)
    bounds = scheduler_limits(limits, plan)
    drafting = build_speculation(config, draft, draft_model, plan, mesh, cache_dtype, bounds)
    grammars = Grammars(partial(Tokenizer.load, folder), decoder.config.vocab_size, ends)
    held = Adapters() if adapters is None else Adapters(adapters.reader.bank.slots)
    for name, content in ({} if adapters is None else adapters.contents).items():
        held.load(name, content)
    scheduler = make_scheduler(BlockManager(plan.num_blocks), plan, bounds, max_shared_len(model, config), held)
    pools = allocate_pools(decoder.cache_layouts, plan, mesh, cache_dtype, policy.ranges)
    engine = _assemble(decoder, pools, mesh, scheduler, grammars, drafting, adapters)
    if config.warmup:
        engine.warm_up(partial(counted, doing="compiling", done="compiled", bar=progress))
    return engine


def _stored_tensors(folder: Path, config: EngineConfig) -> Mapping[str, TensorRef]:
    """The tensors in the model's files; none where random weights take their place."""
    return {} if config.load_format == "dummy" else open_checkpoint(folder, config.model_format)


def resolve_limits(model: ModelConfig, config: EngineConfig, mesh: Mesh) -> Limits:
    """Fill the gaps of ``config``: what the model was made for, and what suits the platform."""
    is_cpu = on_cpu(mesh)
    stretched = int(model.max_position * max(config.rope_scaling_factor, 1.0))
    session_len = config.session_len or min(stretched, DEFAULT_SESSION_LEN)
    if session_len > stretched:
        logger.warning(
            "session_len=%d is more than the %d tokens the model was made for: text beyond them degrades, "
            "and a sequence may need %.0f times the KV cache; session_len=%d avoids both",
            session_len,
            stretched,
            session_len / stretched,
            stretched,
        )
    max_batch_size = config.max_batch_size or (8 if is_cpu else 128)
    prefill = config.max_prefill_token_num or (512 if is_cpu else 8192)
    prefill = _whole_rows(min(prefill, max_batch_size * session_len))
    mixed = _whole_rows(config.num_tokens_per_iter or (128 if is_cpu else 2048))
    dtype = float_dtype(config.dtype, model, mesh)
    return Limits(session_len, max_batch_size, prefill, mixed, min(config.decode_steps, session_len), dtype)


def _whole_rows(tokens: int) -> int:
    """``tokens``, or a few more."""
    return -(-tokens // ROW_LENGTH) * ROW_LENGTH


def max_shared_len(model: ModelConfig, config: EngineConfig) -> int:
    """Prompt tokens up to which sequences may share blocks; 0: none do.

    Dynamic NTK turns keys by angles of the whole prompt's length, once that is more than the model was trained for.
    """
    if not config.enable_prefix_caching:
        return 0
    stretched = [layer.positions.rope for layer in model.layers if layer.positions.rope.kind == "dynamic"]
    return min((rope.original_length for rope in stretched), default=sys.maxsize)


def _outputs_first(mesh: Mesh) -> bool:
    """A CPU multiplies such weights fastest; the fused kernels, interpreted there, take them as a GPU does."""
    return on_cpu(mesh) and preferred("decode_layer") != fused_decode.KERNELS


def _model_config(hf: Mapping[str, Any], config: EngineConfig) -> ModelConfig:
    model = family_of(hf).model_config(hf)
    return model.with_dynamic_rope(config.rope_scaling_factor) if config.rope_scaling_factor >= 1.0 else model


class Drafting(NamedTuple):
    """How drafts are made."""

    speculation: Speculation | None = None
    """``None`` without drafts."""
    features: Features | None = None
    """Written by the steps of the model for the head that drafts."""
    tap: FeatureTap | None = None
    """How the features are made."""


def build_speculation(
    config: EngineConfig,
    draft: DraftModel | None,
    model: Model | None,
    plan: CachePlan,
    mesh: Mesh,
    dtype: CacheDtype,
    limits: SchedulerLimits,
) -> Drafting:
    """Return the drafting that ``config`` asks for. ``model`` is the loaded ``draft``, if a model drafts."""
    method = method_of(config)
    if method is None:
        return Drafting()
    count = config.num_speculative_tokens or DEFAULT_DRAFTS[method]
    if draft is None or model is None:
        return Drafting(Speculation(NgramProposer(), count))
    pools = allocate_pools(model.cache_layouts, plan, mesh, dtype)
    features, tap = None, None
    if draft.eagle3 is not None and isinstance(model, Eagle3):
        *pools_of_layers, array = pools
        pools = tuple(pools_of_layers)
        features = Features(array)
        tap = FeatureTap(draft.eagle3.taps, model.fuse[...])
    table_length = limits.blocks_for(limits.session_len)
    shapes = draft_shapes(limits.max_batch_size, limits.max_prefill_tokens, table_length, count)
    state = DeviceState.of(pools, limits.max_batch_size, limits.session_len, mesh)
    runner = ModelRunner(model, plan_steps(model, mesh, pools, shapes), state, features=features)
    proposer = DraftProposer(runner, shapes, draft.config.vocab_size, count, first=1 if features else 0)
    return Drafting(Speculation(proposer, count), features, tap)


def _assemble(
    model: Model,
    pools: Pools,
    mesh: Mesh,
    scheduler: Scheduler,
    grammars: Grammars,
    drafting: Drafting,
    adapters: EngineAdapters | None,
) -> Engine:
    limits, speculation = scheduler.limits, drafting.speculation
    shapes = shapes_of(limits, speculation.count if speculation else 0)
    logger.info("%d step shapes (decodes, prompt tokens): %s", len(shapes), " ".join(map(str, shapes)))
    runner = ModelRunner(
        model,
        plan_steps(model, mesh, pools, shapes),
        DeviceState.of(pools, limits.max_batch_size, limits.session_len, mesh),
        adapters=None if adapters is None else (adapters.reader.bank, adapters.arrays),
        features=drafting.features,
        tap=drafting.tap,
    )
    reader = None if adapters is None else adapters.reader
    return Engine(scheduler, runner, shapes, model.config.vocab_size, grammars, speculation, reader)


def scheduler_limits(limits: Limits, plan: CachePlan) -> SchedulerLimits:
    """Return the limits of a scheduler over the blocks of ``plan``."""
    return SchedulerLimits(
        block_size=plan.block_size,
        max_batch_size=limits.max_batch_size,
        max_prefill_tokens=limits.max_prefill_tokens,
        max_mixed_tokens=limits.max_mixed_tokens,
        row_length=ROW_LENGTH,
        session_len=limits.session_len,
        decode_steps=limits.decode_steps,
    )


def make_scheduler(
    blocks: BlockManager,
    plan: CachePlan,
    limits: SchedulerLimits,
    max_shared_len: int,
    adapters: Adapters | None = None,
) -> Scheduler:
    """Return a scheduler. Prompts of up to ``max_shared_len`` tokens share blocks."""
    prefixes = PrefixCache(blocks, plan.block_size, max_shared_len, plan.host_blocks)
    return Scheduler(blocks, prefixes, limits, adapters)


def shapes_of(limits: SchedulerLimits, drafts: int = 0) -> list[StepShape]:
    """Return the shapes of all steps within ``limits``, with up to ``drafts`` tokens that are verified."""
    return step_shapes(
        limits.max_batch_size,
        limits.max_prefill_tokens,
        limits.max_mixed_tokens,
        limits.blocks_for(limits.session_len),
        limits.decode_steps,
        drafts,
    )


def _enable_compilation_cache(config: EngineConfig) -> None:
    """Keep compiled programs on disk, unless the user has told JAX where already."""
    if config.compilation_cache_dir is None and getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    folder = user_path(config.compilation_cache_dir or DEFAULT_CACHE_DIR)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
