"""Two and four devices compute what one does, and each holds its share."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxdeploy.checkpoint.adapter import adaptable
from jaxdeploy.compress.streams import HiddenStates
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.inputs import padding_inputs
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.cache_layout import CacheDtype, HeadsLayout
from jaxdeploy.models.decoder import abstract_params, cache_layouts
from jaxdeploy.models.lora import bank_of
from jaxdeploy.models.registry import family_of
from jaxdeploy.parallel.mesh import TP_AXIS, make_mesh
from jaxdeploy.parallel.sharding import RULES, device_bytes, replicated, sharding_of
from tests import tiny_models
from tests.selection import every_other
from tests.tiny_models import (
    BLOCK_SIZE,
    CONFIG,
    SESSION_LEN,
    SHAPES,
    VOCAB,
    attention_of,
    lasting_runner,
    outputs_of,
    params,
    prompt,
    request,
    run,
    runner_of,
    tiny_engine,
)

TP_SHAPES = [SHAPES[2], SHAPES[4]]
"""One to prefill, one to decode; all rows take the full sampler, so two programs are compiled for each ``tp``."""

CUT = {"wqkv": 1, "wo": 0, "gate_up": 2, "down": 0, "weight": 1}
"""Name of a parameter → the axis that tensor parallelism cuts; the others are whole everywhere."""


def generate(tp: int) -> tuple[dict[str, list[int]], np.ndarray[Any, Any]]:
    """Tokens of greedy and sampled requests, chunked and preempted, and their log-probabilities."""
    engine = tiny_engine(tp=tp, shapes=TP_SHAPES, blocks=14)
    loaded: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}
    items = [
        request(str(length), prompt(length), logprobs=3, max_new_tokens=20, **(loaded if length % 2 else {}))
        for length in (1, 16, 33, 70, 40, 41)
    ]
    outputs = outputs_of(engine, items)
    assert engine.scheduler.preemptions > 0
    tokens = {name: [step.token_ids[0] for step in steps] for name, steps in outputs.items()}
    values = [step.logprobs[0].logprob for name in tokens for step in outputs[name]]
    return tokens, np.array(values)


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_several_devices_generate_what_one_does(tp: int) -> None:
    (tokens, logprobs), (expected, truth) = generate(tp), generate(1)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, truth, rtol=0, atol=5e-5)


@pytest.mark.parametrize("tp", [2, 4])
def test_weights_are_cut(tp: int) -> None:
    cut = 0
    for path, array in params(tp=tp).items():
        axis = CUT.get(str(path[-1]))
        share = [size // tp if index == axis else size for index, size in enumerate(array.shape)]
        assert [list(shard.data.shape) for shard in array.addressable_shards] == [share] * tp
        cut += axis is not None
    assert cut == 4 * CONFIG.num_layers + 1


@pytest.mark.parametrize("tp", every_other([4, 2]))
def test_pools_stay_cut_along_kv_heads(tp: int) -> None:
    """After steps too: the donated pools that come back are where they were."""
    runner = lasting_runner(tp)
    outputs_of(tiny_engine(tp=tp, shapes=TP_SHAPES), [request("a", prompt(3), logprobs=0, max_new_tokens=2)])
    shape = (128, 2, attention_of(CONFIG).num_kv_heads // tp, BLOCK_SIZE, attention_of(CONFIG).head_dim)
    for pool in jax.tree.leaves(runner._own_state.pools):
        assert {shard.data.shape for shard in pool.addressable_shards} == {shape}
        assert len({shard.device for shard in pool.addressable_shards}) == tp


@pytest.mark.parametrize("tp", [2, 4])
def test_a_layer_costs_two_all_reduces(tp: int) -> None:
    """One after attention, one after the feed-forward, and no other traffic of the activations' size."""
    inputs = padding_inputs(SHAPES[2], VOCAB, full_sampler=False)
    compiled = str(lasting_runner(tp).compiled(inputs).as_text())
    activations = rf"f32\[{SHAPES[2].decodes},{CONFIG.hidden_size}\]\S*"
    assert len(re.findall(rf"= {activations} all-reduce\(", compiled)) == 2 * CONFIG.num_layers
    assert not re.findall(rf"= {activations} (all-gather|all-to-all|collective-permute)\(", compiled)


def test_pools_take_a_share_of_memory_on_each_device() -> None:
    mesh, layouts, dtype = make_mesh(4), cache_layouts(CONFIG), CacheDtype(jnp.dtype(jnp.float32))
    plan = plan_cache(layouts, EngineConfig(), mesh, session_len=SESSION_LEN, max_batch_size=1, dtype=dtype)
    pools = jax.tree.leaves(allocate_pools(layouts, plan, mesh, dtype))
    on_one = sum(shard.data.nbytes for pool in pools for shard in pool.addressable_shards if shard.device.id == 0)
    assert on_one == plan.num_blocks * plan.block_bytes


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """A mesh with a second axis, (dp, tp) = (2, 2), which ``tiny_models`` takes for every mesh."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", TP_AXIS))
    monkeypatch.setattr(tiny_models, "make_mesh", lambda tp: mesh)
    return mesh


def test_sizes_are_those_of_the_tp_axis(grid: Mesh) -> None:
    """Each device of a (dp, tp) mesh holds what it holds under tp alone, and a batch is spread over tp."""
    alone, dtype, sizes = make_mesh(2), jnp.dtype(jnp.float32), EngineConfig(num_blocks=9)
    for path, param in abstract_params(CONFIG, dtype).items():
        shape = param.get_value().shape
        expected = sharding_of(alone, param.axes, shape)
        assert sharding_of(grid, param.axes, shape).spec == expected.spec, path
        assert device_bytes(sharding_of(grid, param.axes, shape), shape, dtype) == device_bytes(expected, shape, dtype)
    on_grid, on_two = (
        plan_cache(cache_layouts(CONFIG), sizes, mesh, session_len=64, max_batch_size=1, dtype=CacheDtype(dtype))
        for mesh in (grid, alone)
    )
    assert on_grid == on_two
    batches = HiddenStates(np.zeros((2, 3, 4), np.float32), 1, grid).batches()
    shardings: list[Any] = [batch.sharding for _, batch in batches]
    assert [sharding.spec for sharding in shardings] == [jax.sharding.PartitionSpec(TP_AXIS)]
    linears = adaptable(family_of({"architectures": ["LlamaForCausalLM"]}), CONFIG)
    banks = [bank_of(CONFIG, linears, mesh, slots=2, max_rank=8, dtype=dtype) for mesh in (grid, alone)]
    assert banks[0].device_bytes == banks[1].device_bytes
    assert banks[0].kinds == banks[1].kinds


@pytest.mark.slow
def test_a_second_axis_changes_no_token(grid: Mesh) -> None:
    runner = runner_of(ModelRunner, 2)
    assert {len(array.sharding.device_set) for array in jax.tree.leaves(runner._own_state.pools)} == {4}
    items = [request(str(length), prompt(length)) for length in (1, 33, 40)]
    assert run(tiny_engine(shapes=TP_SHAPES, runner=runner), items) == run(tiny_engine(shapes=TP_SHAPES), items)


def test_every_logical_axis_has_a_rule() -> None:
    named = {axis for param in abstract_params(CONFIG, jnp.dtype(jnp.float32)).values() for axis in param.axes}
    assert {axis for axis in named | set(HeadsLayout.AXES) if axis is not None} <= set(RULES)


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    mesh = make_mesh(4)
    assert sharding_of(mesh, ("embed", "vocab"), (32, 98)).spec == jax.sharding.PartitionSpec(None, None)
    assert sharding_of(mesh, ("embed", "vocab"), (32, 96)).spec == jax.sharding.PartitionSpec(None, TP_AXIS)
    assert replicated(mesh).is_fully_replicated


@pytest.mark.parametrize("tp", [0, 9])
def test_tp_needs_devices(tp: int) -> None:
    with pytest.raises(ConfigError, match=f"tp={tp} must be between 1 and the 8 devices of this machine"):
        make_mesh(tp)
