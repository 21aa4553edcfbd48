"""The head of EAGLE-3: its guesses are those of a plain computation over the whole sequence, and change no token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy import GenerationConfig, pipeline
from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint.eagle3 import load_eagle3
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.buckets import draft_shapes
from jaxdeploy.engine.device.features import Features, FeatureTap
from jaxdeploy.engine.device.kv_cache import allocate_pools, plan_cache
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.device.step import DeviceState
from jaxdeploy.engine.device.step_plan import StepPlan
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.speculation.draft import DraftProposer
from jaxdeploy.engine.speculation.gate import Gate
from jaxdeploy.engine.speculation.speculation import Speculation
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.attention import DenseContext
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.models.eagle3 import Eagle3, Eagle3Config, eagle3_config
from jaxdeploy.models.model import Positions
from jaxdeploy.models.registry import family_of
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.parallel.sharding import replicated
from tests.tiny_models import (
    BLOCK_SIZE,
    CONFIG,
    GUESSES,
    MAX_PREFILL,
    SESSION_LEN,
    SLOTS,
    SMALLER,
    TABLE_LENGTH,
    VOCAB,
    AlwaysOpen,
    LastingRunner,
    changed,
    dense_decoder,
    prompt,
    request,
    run,
    run_one,
    runner_of,
    tiny_engine,
)

Array = np.ndarray[Any, Any]

CHOICES = 60
TAPS = (0, 1, 1)
HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "vocab_size": VOCAB,
    "draft_vocab_size": CHOICES,
    "hidden_size": CONFIG.hidden_size,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(TAPS)},
}


def tensors(hf: dict[str, Any], model_size: int, layer: str = "midlayer", seed: int = 0) -> dict[str, Array]:
    """Random ones, as the authors name them."""
    draw = np.random.default_rng(seed)
    size, width, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"] * hf["head_dim"]
    kv = hf["num_key_value_heads"] * hf["head_dim"]
    shapes = {
        "fc.weight": (size, 3 * model_size),
        f"{layer}.self_attn.q_proj.weight": (heads, 2 * size),
        f"{layer}.self_attn.k_proj.weight": (kv, 2 * size),
        f"{layer}.self_attn.v_proj.weight": (kv, 2 * size),
        f"{layer}.self_attn.o_proj.weight": (size, heads),
        f"{layer}.mlp.gate_proj.weight": (width, size),
        f"{layer}.mlp.up_proj.weight": (width, size),
        f"{layer}.mlp.down_proj.weight": (size, width),
        "lm_head.weight": (hf["draft_vocab_size"], size),
    }
    made = {name: draw.standard_normal(shape) * 2 / np.sqrt(shape[1]) for name, shape in shapes.items()}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    for name in (*(f"{layer}.{norm}.weight" for norm in norms), "norm.weight"):
        made[name] = 1 + 0.1 * draw.standard_normal(size)
    chosen = np.sort(draw.choice(hf["vocab_size"], hf["draft_vocab_size"], replace=False))
    mask = np.zeros(hf["vocab_size"], bool)
    mask[chosen] = True
    floats = {name: value.astype(np.float32) for name, value in made.items()}
    return {**floats, "d2t": chosen - np.arange(len(chosen)), "t2d": mask}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("eagle3")
    put_json(made / "config.json", HF)
    put_tensors(made / "model.safetensors", tensors(HF, CONFIG.hidden_size))
    return made


def load(folder: Path, model: ModelConfig = CONFIG, tp: int = 1) -> tuple[Eagle3, Eagle3Config]:
    config = eagle3_config(read_hf_config(folder), model)
    mesh = make_mesh(tp)
    embedding = jax.device_put(dense_decoder().embedding.table[...], replicated(mesh))
    return load_eagle3(folder, config, embedding, mesh, jnp.dtype(jnp.float32)), config


@functools.cache
def runners(folder: Path, tp: int) -> tuple[ModelRunner, ModelRunner]:
    """The model's, and that of the head in ``folder``; all engines share them."""
    head, config = load(folder, tp=tp)
    mesh, sizes, dtype = make_mesh(tp), EngineConfig(block_size=BLOCK_SIZE), CacheDtype(jnp.dtype(jnp.float32))
    layouts = cache_layouts(CONFIG)
    plan = plan_cache(layouts, sizes, mesh, session_len=SESSION_LEN, max_batch_size=SLOTS, dtype=dtype)
    kv, array = allocate_pools(head.cache_layouts, plan, mesh, dtype)
    features, tap = Features(array), FeatureTap(config.taps, head.fuse[...])
    guesses = LastingRunner(head, StepPlan(mesh), DeviceState.of((kv,), SLOTS, SESSION_LEN, mesh), features=features)
    return runner_of(LastingRunner, tp, features=features, tap=tap), guesses


def guessing_engine(folder: Path, tp: int = 1, **options: Any) -> Engine:
    """A tiny engine whose model has the head of ``folder``."""
    model, runner = runners(folder, tp)
    shapes = [s for s in draft_shapes(SLOTS, MAX_PREFILL, TABLE_LENGTH, GUESSES) if s.decodes in (0, 1, SLOTS)]
    speculation = Speculation(DraftProposer(runner, shapes, VOCAB, GUESSES, first=1), GUESSES, AlwaysOpen())
    return tiny_engine(tp=tp, runner=model, speculation=speculation, **options)


def rms(x: Array, scale: Any) -> Array:
    normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    return normed


def turned(x: Array, positions: Array) -> Array:
    """Rotary positions of [T, heads, H]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def plain_guesses(named: dict[str, Array], token_ids: list[int], count: int) -> list[int]:
    """From the paper and the authors' checkpoints, in float64, over whole sequences."""
    decoder = dense_decoder()
    known = jnp.asarray(token_ids[:-1], jnp.int32)
    positions = Positions.of_prompts(1, len(known))
    hidden = decoder.hidden(decoder.embed(known), positions, DenseContext(1), [None, None], taps=TAPS)
    stream = np.concatenate([np.asarray(residual, np.float64) for residual in hidden.tapped], -1)
    features = list(stream @ named["fc.weight"].T.astype(np.float64))
    table = np.asarray(decoder.embedding.table[...], np.float64)
    tokens, found = list(token_ids[1:]), list[int]()
    for _ in range(count):
        last = plain_layer(named, table[np.array(tokens)], np.array(features))[-1]
        logits = rms(last, named["norm.weight"]) @ named["lm_head.weight"].T
        best = int(logits.argmax())
        found.append(best + int(named["d2t"][best]))
        tokens.append(found[-1])
        features.append(last)
    return found


def plain_layer(named: dict[str, Array], embedded: Array, features: Array) -> Array:
    """[T, D] of tokens and of the features before them → [T, D]."""
    layer = "midlayer"
    weight = {key.removeprefix(f"{layer}."): value.astype(np.float64) for key, value in named.items() if layer in key}
    x = np.concatenate(
        [rms(embedded, weight["input_layernorm.weight"]), rms(features, weight["hidden_norm.weight"])], -1
    )
    length, size = len(x), HF["head_dim"]
    q, k, v = ((x @ weight[f"self_attn.{n}_proj.weight"].T).reshape(length, -1, size) for n in "qkv")
    q, k = turned(q, np.arange(length)), turned(k, np.arange(length))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
    scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v).reshape(length, -1)
    x = features + attended @ weight["self_attn.o_proj.weight"].T
    normed = rms(x, weight["post_attention_layernorm.weight"])
    gate = normed @ weight["mlp.gate_proj.weight"].T
    gated = gate / (1 + np.exp(-gate)) * (normed @ weight["mlp.up_proj.weight"].T)
    out: Array = x + gated @ weight["mlp.down_proj.weight"].T
    return out


@pytest.mark.parametrize(
    ("length", "max_prefill"),
    [(2, 64), pytest.param(16, 64, marks=pytest.mark.slow), pytest.param(70, 32, marks=pytest.mark.slow)],
)
def test_guesses_are_those_of_the_plain_computation(folder: Path, length: int, max_prefill: int) -> None:
    engine = guessing_engine(folder, max_prefill=max_prefill)
    named = tensors(HF, CONFIG.hidden_size)
    seen = watch(engine)
    run_one(engine, prompt(length), max_new_tokens=9)
    assert seen
    for known, drafts in seen:
        assert list(drafts) == plain_guesses(named, known, len(drafts))


def watch(engine: Engine) -> list[tuple[list[int], tuple[int, ...]]]:
    """Will have the tokens of a sequence and what is guessed behind them, each time."""
    seen: list[tuple[list[int], tuple[int, ...]]] = []
    assert engine._speculation is not None
    propose = engine._speculation._proposer.propose

    def watched(room: dict[Sequence, int]) -> Any:
        found = propose(room)
        seen.extend((list(sequence.token_ids), drafts) for sequence, drafts in found.items())
        return found

    engine._speculation._proposer.propose = watched  # type: ignore[method-assign,assignment]
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"blocks": 20}, marks=pytest.mark.slow),
        pytest.param({"decode_steps": 1, "max_prefill": 32}, marks=pytest.mark.slow),
    ],
)
def test_no_token_changes(folder: Path, options: dict[str, Any]) -> None:
    items = [
        request(f"{n}", prompt(1 + 5 * n, seed=n), max_new_tokens=12 + n, temperature=0.7 * (n % 2), seed=n)
        for n in range(12)
    ]
    engine = guessing_engine(folder, **options)
    assert run(engine, items) == run(tiny_engine(), items)
    assert engine.stats.speculation.rounds > 0


@pytest.mark.slow
def test_tensor_parallelism(folder: Path) -> None:
    items = [request(f"{n}", prompt(3 + 9 * n, seed=n), max_new_tokens=12) for n in range(4)]
    engine = guessing_engine(folder, tp=2)
    seen = watch(engine)
    assert run(engine, items) == run(tiny_engine(), items)
    named = tensors(HF, CONFIG.hidden_size)
    assert all(list(drafts) == plain_guesses(named, known, len(drafts)) for known, drafts in seen)


def test_other_names(folder: Path, tmp_path: Path) -> None:
    """As vLLM's ``speculators`` write it, with an embedding of its own."""
    named = tensors(HF, CONFIG.hidden_size, layer="layers.0") | {
        "embed_tokens.weight": np.ones((VOCAB, CONFIG.hidden_size), np.float32)
    }
    put_json(tmp_path / "config.json", HF)
    put_tensors(tmp_path / "model.safetensors", named)
    head, _ = load(tmp_path)
    same, _ = load(folder)
    np.testing.assert_array_equal(head.mlp_norm.scale[...], same.mlp_norm.scale[...])
    np.testing.assert_array_equal(head.fuse[...], same.fuse[...])
    assert (head.embedding.table[...] == 1).all()


def test_heads_for_other_models(folder: Path, tmp_path: Path) -> None:
    for change, complaint in (
        ({"vocab_size": 97}, "vocab_size=97 of the head"),
        ({"target_hidden_size": 48}, "target_hidden_size=48"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 30]}}, "reads layers"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            eagle3_config({**HF, **change}, CONFIG)
    named = tensors(HF, CONFIG.hidden_size)
    del named["norm.weight"]
    put_json(tmp_path / "config.json", HF)
    put_tensors(tmp_path / "model.safetensors", {**named, "fc.weight": named["fc.weight"][:, :32]})
    with pytest.raises(CheckpointError, match=r"(?s)norm.weight: missing.*fc.weight: shape"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d2t: d2t.astype(np.float32), "d2t: dtype float32, integers expected"),
        (lambda d2t: d2t[:-1], r"d2t: shape .*59.*60"),
        (lambda d2t: np.where(np.arange(CHOICES) == 7, VOCAB - 7, d2t), f"d2t: names tokens .* vocab_size={VOCAB}"),
        (lambda d2t: np.where(np.arange(CHOICES) == 7, -8, d2t), "d2t: names tokens"),
        (lambda d2t: np.where(np.arange(CHOICES) == 7, 2**63 - 1, d2t), "d2t: names tokens"),
        (lambda d2t: np.where(np.arange(CHOICES) == 7, 2**64 - 1, d2t.astype(np.uint64)), "d2t: names tokens"),
    ],
)
def test_a_table_of_tokens_that_is_wrong(folder: Path, tmp_path: Path, change: Any, complaint: str) -> None:
    named = tensors(HF, CONFIG.hidden_size)
    put_json(tmp_path / "config.json", HF)
    put_tensors(tmp_path / "model.safetensors", {**named, "d2t": change(named["d2t"])})
    with pytest.raises(CheckpointError, match=complaint):
        load(tmp_path)


def test_any_type_of_integers_holds_the_table_of_tokens(folder: Path, tmp_path: Path) -> None:
    named = tensors(HF, CONFIG.hidden_size)
    put_json(tmp_path / "config.json", HF)
    wanted, _ = load(folder)
    for dtype in (np.int8, np.uint16, np.uint64):
        put_tensors(tmp_path / "model.safetensors", {**named, "d2t": named["d2t"].astype(dtype)})
        head, _ = load(tmp_path)
        np.testing.assert_array_equal(head.tokens[...], wanted.tokens[...])
        assert head.tokens[...].dtype == jnp.int32


def test_default_taps() -> None:
    assert eagle3_config({k: v for k, v in HF.items() if k != "eagle_config"}, _deep(32)).taps == (2, 16, 29)


def _deep(layers: int) -> ModelConfig:
    return changed(SMALLER, num_layers=layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundled", "stories260K"])
def test_on_real_models(name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(bundled_model()) if name == "bundled" else shared / "assets/models" / name
    sizes = family_of(read_hf_config(model)).model_config(read_hf_config(model))
    hf = {**HF, "vocab_size": sizes.vocab_size, "hidden_size": sizes.hidden_size}
    hf["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    put_json(tmp_path / "config.json", hf)
    put_tensors(tmp_path / "model.safetensors", tensors(hf, sizes.hidden_size))
    monkeypatch.setattr(Gate, "is_open", lambda gate, batch: True)
    options: dict[str, Any] = {"warmup": False, "session_len": 256, "max_batch_size": 16}
    how = [
        GenerationConfig(do_sample=n % 3 == 2, random_seed=n, max_new_tokens=40, repetition_penalty=1 + 0.1 * (n % 2))
        for n in range(16)
    ]
    asked = ["Hello", "What is 7 + 8?", "My name is Anna. What is my name?", "Which flags are there?"] * 4
    with pipeline(str(model), **options) as pipe:
        plain: Any = pipe(asked, how)
    expected = [reply.text for reply in plain]
    with pipeline(str(model), speculative_method="eagle3", speculative_model=str(tmp_path), **options) as pipe:
        replies: Any = pipe(asked, how)
        alone: Any = [pipe(text, how[index]) for index, text in enumerate(asked[:4])]
    assert [reply.text for reply in replies] == expected
    assert [reply.text for reply in alone] == expected[:4]
    assert sum(reply.speculation.rounds for reply in replies) > 0
