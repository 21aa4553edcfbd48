"""A second cache geometry from outside of the product: see ``latent_family``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.host_blocks import GROUP, HostBlocks
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.device.kv_policy import kv_policy
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.scheduling.host_tier import Transfer
from jaxdeploy.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxdeploy.messages import Request
from jaxdeploy.models.cache_layout import CacheDtype, CacheLayout, FeaturesLayout, HeadsLayout
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.layer import LayerConfig
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.parallel.sharding import sharding_of
from tests.latent_family import LatentLayout, latent
from tests.tiny_models import (
    CONFIG,
    SHAPES,
    LastingRunner,
    prompt,
    request,
    run,
    runner_of,
    tiny_engine,
)

RANK = 16
FLOATS = CacheDtype(jnp.dtype(jnp.float32))
FEW_SHAPES = [SHAPES[2], SHAPES[4]]


def mixed_decoder() -> Decoder:
    """The tiny decoder, whose first layer keeps latent vectors and whose second keeps keys and values."""
    first, second = CONFIG.layers
    assert isinstance(first, LayerConfig)
    config = replace(CONFIG, layers=(latent(first, RANK), second))
    return Decoder(config, rngs=nnx.Rngs(0))


@functools.cache
def runner(tp: int) -> ModelRunner:
    """The one that all engines here share, with weights large enough that logits differ by more than rounding."""
    decoder, random, mesh = nnx.eval_shape(mixed_decoder), np.random.default_rng(0), make_mesh(tp)
    flat: Any = {}
    for path, param in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        shape = param.get_value().shape
        value = random.standard_normal(shape) * (2.0 / np.sqrt(CONFIG.hidden_size))
        value = value + 1.0 if path[-1] == "scale" else value
        flat[path] = param.replace(jax.device_put(value.astype(np.float32), sharding_of(mesh, param.axes, shape)))
    nnx.update(decoder, nnx.from_flat_state(flat))
    return runner_of(LastingRunner, tp, model=decoder)


def requests() -> list[Request]:
    """Prompts with a common beginning of two blocks."""
    return [request(f"{n}", prompt(40) + prompt(9 * n, n), max_new_tokens=10) for n in range(5)]


def on_first_device(pools: Any) -> int:
    arrays = jax.tree.leaves(pools)
    return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards if shard.device.id == 0)


def planned(layouts: Sequence[CacheLayout], tp: int, **settings: Any) -> tuple[Any, Any]:
    mesh, config = make_mesh(tp), EngineConfig(**{"block_size": 16, "num_blocks": 7, **settings})
    plan = plan_cache(layouts, config, mesh, session_len=96, max_batch_size=1, dtype=FLOATS)
    return plan, allocate_pools(layouts, plan, mesh, FLOATS)


LATENT, HEADS, FEATURES = LatentLayout(RANK, 8), HeadsLayout(4, 8, 8), FeaturesLayout(32)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("layouts", "whole", "shared"),
    [
        ((LATENT, HEADS, LATENT), 2 * 4 * 8, 2 * (RANK + 8)),
        ((HEADS, FEATURES), 2 * 4 * 8, 32),
        ((HeadsLayout(2, 16, 16), HEADS), 2 * 2 * 16 + 2 * 4 * 8, 0),
    ],
)
def test_the_plan_is_what_is_allocated(layouts: tuple[CacheLayout, ...], whole: int, shared: int, tp: int) -> None:
    """KV heads are cut along ``tp``; latent vectors and the features of an EAGLE-3 head are whole on each device."""
    plan, pools = planned(layouts, tp)
    assert plan.block_bytes == 4 * 16 * (whole // tp + shared)
    assert plan.host_block_bytes == 4 * 16 * (whole + shared)
    assert on_first_device(pools) == plan.num_blocks * plan.block_bytes


def test_prefix_cache_on_is_off_and_tp_2_is_tp_1() -> None:
    truth = run(tiny_engine(runner=runner(1), shapes=FEW_SHAPES, sharing=False), requests())
    assert len({tuple(tokens) for tokens in truth.values()}) == len(truth)
    for tp in (1, 2):
        engine = tiny_engine(runner=runner(tp), shapes=FEW_SHAPES)
        assert run(engine, requests()) == truth
        assert run(engine, requests()) == truth, "the second time from cached blocks"
        assert engine.scheduler.prefixes.found > 0


def test_blocks_return_from_the_host() -> None:
    truth = run(tiny_engine(runner=runner(1), shapes=FEW_SHAPES), requests())
    engine = tiny_engine(runner=runner(1), shapes=FEW_SHAPES, blocks=8, host_blocks=32)
    assert [run(engine, requests()) for _ in range(2)] == [truth, truth]
    assert engine.scheduler.prefixes.restored > 0


@pytest.mark.parametrize("tp", [1, 2])
def test_host_copies_of_unequal_layers_are_exact(tp: int) -> None:
    count = GROUP + 1
    random = np.random.default_rng(0)
    _, empty = planned((LATENT, HEADS, LATENT), tp, num_blocks=2 * count)
    pools = jax.tree.map(lambda array: jax.device_put(random.random(array.shape, np.float32), array.sharding), empty)
    before = [np.asarray(array).copy() for array in jax.tree.leaves(pools)]
    out = [Transfer(block, block, to_device=False) for block in range(count)]
    back = [Transfer(count + block, block, to_device=True) for block in range(count)]
    pools = HostBlocks(pools).copy(pools, [*out, *back])
    for old, array in zip(before, jax.tree.leaves(pools), strict=True):
        np.testing.assert_array_equal(array, np.concatenate([old[:count], old[:count]]))


def test_cleared_blocks_are_zero_in_every_layer() -> None:
    pools = runner(1)._own_state.pools
    held = [np.asarray(array).copy() for array in jax.tree.leaves(pools)]
    runner(1).clear_blocks([3, 5])
    for old, array in zip(held, jax.tree.leaves(runner(1)._own_state.pools), strict=True):
        old[[3, 5]] = 0
        np.testing.assert_array_equal(array, old)


def test_what_a_layout_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant_policy=8 is not available for LatentLayout; leave it out"):
        kv_policy(tmp_path, [HEADS, LATENT], EngineConfig(quant_policy=8))
    with pytest.raises(CheckpointError, match="LatentLayout has no calibrated ranges"):
        LATENT.ranges(np.ones((1, 4), np.float32))
    with pytest.raises(UnsupportedModelError, match="key_dim=24 must equal value_dim=16"):
        HeadsLayout(4, 24, 16).bytes_per_block(16, FLOATS)
