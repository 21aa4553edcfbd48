"""A decode step through the fused kernels (interpreted) against the same step op by op."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.step_plan import StepPlan, plan_steps
from jaxdeploy.models import decoder as decoder_module
from jaxdeploy.models import fused_decode
from jaxdeploy.models.attention import PagedContext, Rows
from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.decoder import Decoder, abstract_params, decoder_from
from jaxdeploy.models.dense import DenseDecoder
from jaxdeploy.models.layer import Layer
from jaxdeploy.models.layers import RMSNorm
from jaxdeploy.models.mlp import MLP
from jaxdeploy.models.model import Positions
from jaxdeploy.models.rope import RopeConfig
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.parallel.sharding import sharding_of
from pallas_kernels.dispatch import ENVIRONMENT
from tests.tiny_models import attention_of

BLOCKS, BLOCK_SIZE, ENTRIES, ROWS = 24, 16, 4, 5
POSITIONS = (0, 15, 16, 40, 7)
REAL = (1, 1, 1, 1, 0)  # the last row is padding

CONFIG = DenseDecoder(
    vocab_size=64,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=256,
    norm_eps=1e-5,
    max_position=256,
    rope=RopeConfig(),
    windows=(None, 12),
    qkv_bias=True,
).model_config()

BFLOAT16 = jnp.dtype(jnp.bfloat16)

Array = np.ndarray[Any, Any]


def decoder_on(tp: int, dtype: str) -> Decoder:
    random, mesh = np.random.default_rng(0), make_mesh(tp)
    made = {}
    for path, param in abstract_params(CONFIG, jnp.dtype(dtype)).items():
        shape = param.get_value().shape
        value = 1 + random.standard_normal(shape) / 10 if path[-1] == "scale" else random.standard_normal(shape) / 16
        made[path] = jax.device_put(value.astype(dtype), sharding_of(mesh, param.axes, shape))
    return decoder_from(CONFIG, made)


def step(backend: str, tp: int = 1, dtype: str = "bfloat16", shift: int = 0) -> tuple[Array, Array]:
    """Hidden states and pools after one step; ``shift`` moves every new token that many places on."""
    mesh, random = make_mesh(tp), np.random.default_rng(1)
    decoder = decoder_on(tp, dtype)
    shape = (BLOCKS, 2, attention_of(CONFIG).num_kv_heads, BLOCK_SIZE, attention_of(CONFIG).head_dim)
    place = sharding_of(mesh, HeadsLayout.AXES, shape)
    pools = [jax.device_put(random.standard_normal(shape).astype(dtype), place) for _ in range(CONFIG.num_layers)]
    tables = random.permutation(BLOCKS)[: ROWS * ENTRIES].reshape(ROWS, ENTRIES).astype(np.int32)
    tokens = random.integers(0, CONFIG.vocab_size, ROWS, np.int32)
    positions = np.array(POSITIONS, np.int32) + np.int32(shift)
    slots = tables[np.arange(ROWS), positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    slots = np.where(REAL, slots, BLOCKS * BLOCK_SIZE).astype(np.int32)

    decodes = StepShape(ROWS, 0, ENTRIES, ROWS)

    def hidden(pools: list[jax.Array], tokens: Array, positions: Array, tables: Array, slots: Array) -> Any:
        rows = Rows(jnp.asarray(tables), jnp.asarray(positions), jnp.array(REAL, jnp.int32), 1)
        context = PagedContext((rows,), jnp.asarray(slots), mesh)
        places = Positions(jnp.asarray(positions), jnp.asarray(positions))
        return plan.forward(decoder, decodes)(decoder.embed(jnp.asarray(tokens)), places, context, pools)

    jitted: list[Any] = [decoder_module._run_layer, fused_decode._run_layer]
    for layer in jitted:
        layer.clear_cache()  # of what was traced for another backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, backend)
        plan = plan_steps(decoder, mesh, pools, [decodes])
        x, new_pools, _ = jax.jit(hidden)(pools, tokens, positions, tables, slots)
    return np.asarray(x, np.float32), np.stack([np.asarray(pool, np.float32) for pool in new_pools])


def difference(a: Array, b: Array) -> float:
    """Relative, over the real rows."""
    real = np.array(REAL, bool)
    return float(np.abs(a - b)[real].max() / np.abs(b)[real].max())


def test_fused_is_op_by_op() -> None:
    fused, pools = step("pallas_triton")
    plain, plain_pools = step("reference")
    # Two layers of about eight roundings to bfloat16 each, which add up like the root of their number.
    tolerance = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    assert difference(fused, plain) < tolerance
    assert np.abs(pools - plain_pools).max() < tolerance * np.abs(plain_pools).max()
    moved, _ = step("pallas_triton", shift=1)
    assert difference(moved, plain) > 4 * tolerance, "a token one place further on is noticed"


@pytest.mark.slow
def test_fused_on_two_devices() -> None:
    fused, pools = step("pallas_triton", tp=2)
    plain, plain_pools = step("reference")
    tolerance = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    assert difference(fused, plain) < tolerance
    assert np.abs(pools - plain_pools).max() < tolerance * np.abs(plain_pools).max()


def test_what_the_fused_kernels_refuse_runs_op_by_op(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jaxdeploy"):
        step("decode_layer=pallas_triton", dtype="float32")
    assert "run op by op: decode_layer: pallas_triton takes bfloat16 and float16, not float32" in caplog.text


@pytest.mark.parametrize(
    ("shape", "fused"),
    [
        (StepShape(4, 0, ENTRIES, 8), True),
        (StepShape(4, 0, ENTRIES, 8, repeats=3), True),
        (StepShape(8, 0, ENTRIES, 8), False),
        (StepShape(4, 32, ENTRIES, 8), False),
        (StepShape(4, 0, ENTRIES, 8, drafts=2), False),
        (StepShape(4, 0, ENTRIES, 8, adapted=True), False),
    ],
)
def test_only_planned_decodes_are_fused(shape: StepShape, fused: bool) -> None:
    assert StepPlan(make_mesh(1), frozenset({4})).is_fused(shape) == fused


class OtherMLP(MLP):
    """Computes something else with the same parameters."""


def _query_norm(layer: Layer) -> None:
    layer.attention.query_norm = RMSNorm(64, 1e-5, dtype=jnp.dtype(jnp.bfloat16))  # type: ignore[attr-defined]


def _softcap(layer: Layer) -> None:
    layer.attention.softcap = 30.0  # type: ignore[attr-defined]


def _second_norm(layer: Layer) -> None:
    layer.post_norm = RMSNorm(CONFIG.hidden_size, CONFIG.norm_eps, dtype=jnp.dtype(jnp.bfloat16))  # type: ignore[attr-defined]


def _other_mlp(layer: Layer) -> None:
    sizes = layer.mlp.config, layer.mlp.width
    layer.mlp = OtherMLP(*sizes, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16))


def _other_eps(layer: Layer) -> None:
    layer.mlp_norm.eps = 1e-3


def _float32_scale(layer: Layer) -> None:
    layer.mlp_norm = RMSNorm(CONFIG.hidden_size, CONFIG.norm_eps, dtype=jnp.dtype(jnp.float32))


def _offset_norm(layer: Layer) -> None:
    layer.mlp_norm.offset = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_query_norm, "do not take attention.query_norm"),
        (_softcap, "do not take attention.softcap"),
        (_second_norm, "do not take post_norm"),
        (_offset_norm, "do not take mlp_norm.offset"),
        (_other_mlp, "mlp is OtherMLP"),
        (_other_eps, "one eps"),
        (_float32_scale, "mlp_norm has a scale in float32, the fused kernels take the activations' bfloat16"),
    ],
)
def test_an_option_that_the_kernels_do_not_know_is_refused(change: Callable[[Layer], None], reason: str) -> None:
    decoder = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    layer = decoder.layers[0]
    assert fused_decode.refusal(layer, decoder.norm, BFLOAT16) is None
    change(layer)
    assert reason in str(fused_decode.refusal(layer, decoder.norm, BFLOAT16))
