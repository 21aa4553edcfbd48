"""From a model's folder and an ``EngineConfig`` to a running engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.checkpoint.model import load_model
from jaxdeploy.checkpoint.tensor_ref import TensorRef
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.adapter_reader import EngineAdapters, adapters_of
from jaxdeploy.engine.device.buckets import ROW_LENGTH, StepShape, step_shapes
from jaxdeploy.engine.device.kv_cache import CachePlan, allocate_pools, plan_cache
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
from jaxdeploy.engine.speculation.build import build_speculation, find_draft_model, load_draft_model
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.stored import user_path
from jaxdeploy.grammar.matcher import Grammars
from jaxdeploy.models import fused_decode
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import has_biased_keys, tensor_parallel
from jaxdeploy.parallel.mesh import make_mesh
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
    decoder = load_model(
        folder,
        hf,
        mesh=mesh,
        dtype=limits.dtype,
        model=model,
        model_format=config.model_format,
        load_format=config.load_format,
        outputs_first=_outputs_first(mesh),
        progress=progress,
    )
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
    drafting = build_speculation(config, draft, draft_model, plan, mesh, cache_dtype, limits)
    shapes = shapes_of(limits, plan, drafting.speculation.count if drafting.speculation else 0)
    logger.info("%d step shapes (decodes, prompt tokens): %s", len(shapes), " ".join(map(str, shapes)))
    pools = allocate_pools(decoder.cache_layouts, plan, mesh, cache_dtype, policy.ranges)
    runner = ModelRunner(
        decoder,
        plan_steps(decoder, mesh, pools, shapes),
        DeviceState.of(pools, limits.max_batch_size, limits.session_len, mesh),
        adapters=(adapters.reader.bank, adapters.arrays) if adapters else None,
        features=drafting.features,
        tap=drafting.tap,
    )
    blocks, shared = BlockManager(plan.num_blocks), longest_shared(model, config)
    engine = Engine(
        make_scheduler(blocks, plan, limits, shared, _loaded(adapters)),
        runner,
        shapes,
        decoder.config.vocab_size,
        Grammars(partial(Tokenizer.load, folder), decoder.config.vocab_size, ends),
        drafting.speculation,
        adapters.reader if adapters else None,
    )
    if config.warmup:
        engine.warm_up(partial(counted, doing="compiling", done="compiled", bar=progress))
    return engine


def _stored_tensors(folder: Path, config: EngineConfig) -> Mapping[str, TensorRef]:
    """The tensors in the model's files; none where random weights take their place."""
    return {} if config.load_format == "dummy" else open_checkpoint(folder, config.model_format)


def resolve_limits(model: ModelConfig, config: EngineConfig, mesh: Mesh) -> Limits:
    """Fill the gaps of ``config``: what the model was made for, and what suits the platform."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
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
    max_batch_size = config.max_batch_size or (8 if on_cpu else 128)
    prefill = config.max_prefill_token_num or (512 if on_cpu else 8192)
    prefill = _whole_rows(min(prefill, max_batch_size * session_len))
    mixed = _whole_rows(config.num_tokens_per_iter or (128 if on_cpu else 2048))
    dtype = _dtype(model, config, on_cpu)
    return Limits(session_len, max_batch_size, prefill, mixed, min(config.decode_steps, session_len), dtype)


def _whole_rows(tokens: int) -> int:
    """``tokens``, or a few more."""
    return -(-tokens // ROW_LENGTH) * ROW_LENGTH


def longest_shared(model: ModelConfig, config: EngineConfig) -> int:
    """Prompt tokens up to which sequences may share blocks; 0: none do.

    Dynamic NTK turns keys by angles of the whole prompt's length, once that is more than the model was trained for.
    """
    if not config.enable_prefix_caching:
        return 0
    stretched = [layer.positions.rope for layer in model.layers if layer.positions.rope.kind == "dynamic"]
    return min((rope.original_length for rope in stretched), default=sys.maxsize)


def _outputs_first(mesh: Mesh) -> bool:
    """A CPU multiplies such weights fastest; the fused kernels, interpreted there, take them as a GPU does."""
    return mesh.devices.flat[0].platform == "cpu" and preferred("decode_layer") != fused_decode.KERNELS


def _dtype(model: ModelConfig, config: EngineConfig, on_cpu: bool) -> jnp.dtype:
    """``auto``: the checkpoint's own on a GPU; float32 on a CPU, where the others are slow."""
    name = config.dtype
    if name == "auto":
        name = "float32" if on_cpu else model.dtype
    return jnp.dtype(name)


def _model_config(hf: Mapping[str, Any], config: EngineConfig) -> ModelConfig:
    model = family_of(hf).model_config(hf)
    return model.with_dynamic_rope(config.rope_scaling_factor) if config.rope_scaling_factor >= 1.0 else model


def _loaded(adapters: EngineAdapters | None) -> Adapters:
    """Return the scheduler's record of the adapters that are loaded at start."""
    if adapters is None:
        return Adapters()
    loaded = Adapters(adapters.reader.bank.slots)
    for name, content in adapters.contents.items():
        loaded.load(name, content)
    return loaded


def make_scheduler(
    blocks: BlockManager, plan: CachePlan, limits: Limits, longest_shared: int, adapters: Adapters | None = None
) -> Scheduler:
    """Return a scheduler whose every batch fits one of ``shapes_of(limits, plan)``."""
    return Scheduler(
        blocks,
        PrefixCache(blocks, plan.block_size, longest_shared, plan.host_blocks),
        SchedulerLimits(
            block_size=plan.block_size,
            max_batch_size=limits.max_batch_size,
            max_prefill_tokens=limits.max_prefill_tokens,
            max_mixed_tokens=limits.max_mixed_tokens,
            row_length=ROW_LENGTH,
            session_len=limits.session_len,
            decode_steps=limits.decode_steps,
        ),
        adapters,
    )


def shapes_of(limits: Limits, plan: CachePlan, drafts: int = 0) -> list[StepShape]:
    """Return every shape of a step, with up to ``drafts`` tokens that are verified."""
    return step_shapes(
        limits.max_batch_size,
        limits.max_prefill_tokens,
        limits.max_mixed_tokens,
        plan.blocks_for(limits.session_len),
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
