"""Adapters beside the weights: every sequence of a batch gets what a decoder with its adapter merged gives it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.checkpoint.adapter import AdapterWeights, adaptable, read_adapter
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder, decoder_from
from jaxdeploy.models.lora import AdaptedWeight, AdapterBank, LowRank, bank_of
from jaxdeploy.models.model import Positions
from jaxdeploy.models.registry import family_of, read_config
from jaxdeploy.models.weights import Linear, ParamPath
from jaxdeploy.parallel.mesh import make_mesh
from tests.selection import every_other
from tests.stored_models import AWQ, SCATTERED, SMOOTH_QUANT, Layout, apart, checkpoint, hf_of, weights_of
from tests.tiny_adapters import ALL, LINEARS, QKV, TinyAdapter
from tests.tiny_models import CONFIG, VOCAB, changed, params

Array = np.ndarray[Any, Any]
FLOAT = jnp.dtype(jnp.float32)
LENGTH, MAX_RANK = 12, 8
ADAPTERS = (
    TinyAdapter(seed=1),
    TinyAdapter(seed=2, targets=("q_proj", "v_proj"), rank=8),
    TinyAdapter(seed=3, targets=("down_proj", "k_proj", "lm_head"), ranks={"down_proj": 1, "k_proj": 5}, rslora=True),
    TinyAdapter(seed=4, targets=(*QKV, "o_proj", "gate_proj"), layers=(1,)),
)
SLOTS = (2, -1, 0, 3, 1, 0)
"""The slot of each sequence of a batch."""
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (len(SLOTS), LENGTH), np.int32)
TIED = replace(CONFIG, tie_embeddings=True)


@functools.cache
def pairs_of(index: int, folder: Path) -> dict[ParamPath, LowRank]:
    return pairs(read_adapter(ADAPTERS[index].write(folder / str(index)), LINEARS))


def pairs(adapter: AdapterWeights, linears: Mapping[ParamPath, Linear] = LINEARS) -> dict[ParamPath, LowRank]:
    found = {path: adapter.pair(linear) for path, linear in linears.items()}
    return {path: pair for path, pair in found.items() if pair is not None}


def product(made: TinyAdapter, linear: Linear) -> Array:
    """What an adapter adds to a linear map, float32 [K, *outputs]."""
    deltas = [made.delta(module).astype(np.float32) for module in linear.modules]
    return np.moveaxis(linear.outputs.join(deltas), -1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def filled(folder: Path, tp: int = 1, config: ModelConfig = CONFIG) -> tuple[AdapterBank, tuple[jax.Array, ...]]:
    """A bank with all of ``ADAPTERS``, whose slots held other ones before."""
    bank = bank_of(config, LINEARS, make_mesh(tp), slots=4, max_rank=MAX_RANK, dtype=FLOAT, head=True)
    arrays = bank.zeros()
    for index in (3, 2, 1, 0, 1, 2, 3):
        arrays = bank.put(arrays, index, bank.content(pairs_of(index, folder)))
    return bank, arrays


def with_adapters(decoder: Decoder, bank: AdapterBank, arrays: tuple[jax.Array, ...], wanted: Any) -> Array:
    """Logits [B, T, V] of ``TOKENS``, or those [wanted, V] of some."""

    @jax.jit
    def run(arrays: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
        slots = jnp.repeat(jnp.array(SLOTS, jnp.int32), LENGTH)
        adapted = bank.adapted(decoder, arrays, slots, wanted)
        positions, context = Positions.of_prompts(len(SLOTS), LENGTH), DenseContext(len(SLOTS))
        pools = [None] * len(adapted.layers)
        x = adapted.hidden(adapted.embed(tokens.reshape(-1)), positions, context, pools, wanted).states
        return bank.logits(adapted, arrays, x, slots if wanted is None else slots[wanted])

    logits = np.asarray(run(arrays, jnp.asarray(TOKENS)))
    return logits if wanted is not None else logits.reshape(*TOKENS.shape, -1)


@functools.cache
def merged_logits(index: int) -> Array:
    """Logits [B, T, V] of a decoder whose weights have an adapter in them; -1: none."""
    held = dict(params())
    for path, linear in LINEARS.items() if index >= 0 else ():
        delta = product(ADAPTERS[index], linear)
        held[path] = held[path] + delta.reshape(held[path].shape)
    return np.asarray(decoder_from(CONFIG, held)(jnp.asarray(TOKENS)))


def truth() -> Array:
    """Each sequence by its own adapter."""
    return np.stack([merged_logits(slot)[row] for row, slot in enumerate(SLOTS)])


@pytest.mark.parametrize("tp", [1, *every_other([2, 4])])
def test_each_sequence_has_its_own_adapter(tp: int, folder: Path) -> None:
    decoder = decoder_from(CONFIG, params(tp=tp))
    ours, expected = with_adapters(decoder, *filled(folder, tp), None), truth()
    for row, slot in enumerate(SLOTS):
        assert apart(ours[row], expected[row]) < 1e-5
        assert slot < 0 or apart(ours[row], merged_logits(-1)[row]) > 0.1


def test_the_last_layer_computes_what_is_wanted(folder: Path) -> None:
    decoder, wanted = decoder_from(CONFIG, params()), np.array([5, 70, 30, 31], np.int32)
    ours = with_adapters(decoder, *filled(folder), wanted)
    assert apart(ours, truth().reshape(-1, VOCAB)[wanted]) < 1e-5


def test_a_tied_head_is_adapted_too(folder: Path) -> None:
    held = {path: value for path, value in params().items() if path != ("head", "weight")}
    held["embedding", "table"] = params()["head", "weight"].T
    tied, untied = (decoder_from(config, held | more) for config, more in _tied_and_not(held))
    bank = filled(folder)
    assert apart(with_adapters(tied, *bank, None), with_adapters(untied, *bank, None)) < 1e-6


def _tied_and_not(held: dict[ParamPath, jax.Array]) -> list[tuple[ModelConfig, dict[ParamPath, jax.Array]]]:
    return [(TIED, {}), (CONFIG, {("head", "weight"): held["embedding", "table"].T})]


def test_arrays_are_cut_as_the_weights_are(folder: Path) -> None:
    bank, arrays = filled(folder, 4)
    for row, kind in enumerate(bank.kinds):
        shardings: list[Any] = [array.sharding for array in arrays[2 * row : 2 * row + 2]]
        assert sum(axis is not None for sharding in shardings for axis in sharding.spec) == 1, kind.path
    assert bank.device_bytes == sum(array.addressable_shards[0].data.nbytes for array in arrays[:-1])


def test_layers_are_traced_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, multiply = [], AdaptedWeight.multiply

    def counted(self: AdaptedWeight, x: jax.Array) -> jax.Array:
        traced.append(self.kind.path)
        return multiply(self, x)

    monkeypatch.setattr(AdaptedWeight, "multiply", counted)
    config = changed(CONFIG, windows=(None, None))
    bank, arrays = filled(folder, config=config)
    decoder = decoder_from(config, params(config))
    jax.jit(lambda arrays: bank.adapted(decoder, arrays, jnp.zeros(24, jnp.int32))(jnp.asarray(TOKENS[:2]))).lower(
        arrays
    )
    assert len(traced) == 4


@pytest.mark.parametrize("layout", [AWQ, SCATTERED, SMOOTH_QUANT], ids=["awq", "act-order", "int8"])
def test_quantized_bases(layout: Layout, tmp_path: Path) -> None:
    """The integers stay as they are: the float products come on top."""
    hf = hf_of("LlamaForCausalLM", num_hidden_layers=1)
    stored, config, linears = checkpoint(layout, hf), read_config(hf), adaptable(family_of(hf), read_config(hf))
    decoder, made = stored.load(tmp_path), TinyAdapter(targets=ALL, base=config)
    bank = bank_of(config, linears, make_mesh(1), slots=1, max_rank=4, dtype=FLOAT)
    own = pairs(read_adapter(made.write(tmp_path / "adapter"), linears), linears)
    arrays, slots = bank.put(bank.zeros(), 0, bank.content(own)), jnp.zeros(TOKENS.size, jnp.int32)
    adapted = bank.adapted(decoder, arrays, slots)
    for weight in weights_of(adapted):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS.size, math.prod(weight.kind.inputs))), FLOAT)
        expected = product(made, linears["layers", 0, *weight.kind.path])
        added = np.asarray(weight.multiply(x) - weight.base.multiply(x))
        assert apart(added, np.tensordot(np.asarray(x), expected, 1)) < 1e-5
    values = stored.values | {f"{m}.weight": stored.values[f"{m}.weight"] + made.delta(m) for m in made.modules()}
    merged = replace(stored, values={name: value.astype(np.float32) for name, value in values.items()}).floats()
    rounded = 0.1 if layout is SMOOTH_QUANT else 1e-4  # that one rounds activations
    assert apart(np.asarray(adapted(jnp.asarray(TOKENS))), np.asarray(merged(jnp.asarray(TOKENS)))) < rounded
