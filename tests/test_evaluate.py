"""Losses against plain float64 formulas, comparisons against themselves, and what a quantised KV cache costs."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.compress import evaluate
from jaxdeploy.compress.evaluate import (
    FakeQuantizedKV,
    Outputs,
    Tally,
    compare,
    compare_outputs,
    load_decoder,
    outputs,
    perplexity,
    token_losses,
)
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.models.attention import AttentionContext, DenseContext, PagedContext, Rows
from jaxdeploy.models.decoder import decoder_from
from jaxdeploy.models.rope import RopeConfig, Rotary, rotary
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.tokenizer import Tokenizer
from pallas_kernels.kv_pool import Pool, QuantizedPool
from pallas_kernels.score_options import ScoreOptions
from tests.tiny_models import CONFIG, VOCAB, changed, dense_decoder, dense_logits, params, prompt

Array = np.ndarray[Any, Any]

DEMO = Path(evaluate.__file__).parents[1] / "demo"
LENGTH = 48
IDS = np.array([prompt(LENGTH, seed) for seed in range(3)], np.int32)


def random_logits(seed: int, sequences: int = 2, length: int = 90, vocab: int = 37) -> Array:
    logits: Array = np.random.default_rng(seed).normal(0, 3, (sequences, length, vocab)).astype(np.float32)
    return logits


def random_ids(sequences: int = 2, length: int = 90, vocab: int = 37) -> Array:
    return np.random.default_rng(9).integers(0, vocab, (sequences, length)).astype(np.int32)


def log_probabilities(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    exact: Array = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return exact


def exact_losses(logits: Array, ids: Array) -> Array:
    losses: Array = -np.take_along_axis(log_probabilities(logits)[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return losses


def attended(context: AttentionContext, qkv: jax.Array, angles: Rotary, pool: Pool | None = None) -> Array:
    scores = ScoreOptions(1 / 4, 20)
    return np.asarray(jax.jit(lambda x, scheme, kv: context.attend(x, scheme, kv, scores)[0])(qkv, angles, pool))


@functools.cache
def float_outputs() -> Outputs:
    return outputs(dense_decoder(), IDS)


def test_losses_are_those_of_the_formula() -> None:
    """180 rows in chunks of 128: the last chunk overlaps the one before."""
    logits, ids = random_logits(0), random_ids()
    assert logits.shape[0] * logits.shape[1] % evaluate.ROWS
    losses = token_losses(logits, ids)
    assert (losses.shape, losses.dtype) == ((2, 89), jnp.float32)
    np.testing.assert_allclose(losses, exact_losses(logits, ids), rtol=1e-5, atol=1e-5)


def test_losses_belong_to_the_next_token() -> None:
    """The formula for the same token is another one."""
    logits, ids = random_logits(0), random_ids()
    shifted = exact_losses(logits, np.roll(ids, 1, axis=1))
    assert np.abs(token_losses(logits, ids) - shifted).max() > 1


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    quality = compare(jnp.zeros((1, 20, 37)), random_logits(1, 1, 20), random_ids(1, 20)).quality()
    assert quality.ppl_before == pytest.approx(37, rel=1e-6)
    assert quality.tokens == 19


def test_nothing_differs_from_itself() -> None:
    logits, ids = random_logits(0), random_ids()
    quality = compare(logits, logits, ids).quality()
    assert (quality.kl, quality.greedy_same) == (0.0, 1.0)
    assert quality.ppl_before == quality.ppl_after == pytest.approx(math.exp(exact_losses(logits, ids).mean()))


def test_comparison_is_that_of_the_formula() -> None:
    before, ids = random_logits(0), random_ids()
    after = before + random_logits(1) / 4
    log_p, log_q = log_probabilities(before)[:, :-1], log_probabilities(after)[:, :-1]
    tally = compare(before, after, ids)
    kl, reverse = ((np.exp(a) * (a - b)).sum() for a, b in ((log_p, log_q), (log_q, log_p)))
    assert tally.kl == pytest.approx(kl, rel=1e-5)
    assert tally.kl != pytest.approx(reverse, rel=1e-2), "KL has a direction"
    assert tally.same == (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    assert 0 < tally.same < tally.tokens == 178
    assert tally.nll_after == pytest.approx(exact_losses(after, ids).sum(), rel=1e-5)


def test_a_masked_vocabulary_adds_nothing() -> None:
    """Where both say −∞ the term is 0 · (−∞ + ∞)."""
    before, after, ids = random_logits(0), random_logits(1), random_ids() % 30
    p, q = (np.concatenate([x[..., :30], np.full_like(x[..., 30:], -np.inf)], -1) for x in (before, after))
    assert compare(p, q, ids).kl == pytest.approx(compare(before[..., :30], after[..., :30], ids).kl, rel=1e-5)


def test_logits_are_never_copied_whole() -> None:
    """What the compiled comparison needs beside its inputs is a few chunks of rows."""
    logits = jax.ShapeDtypeStruct((1, 2048, 5000), jnp.float32)
    program = evaluate._compared_logits.lower(logits, logits, jax.ShapeDtypeStruct((1, 2048), jnp.int32)).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2048 * 5000 * 4 / 2


def test_tallies_add_up() -> None:
    before, after, ids = random_logits(0), random_logits(1), random_ids()
    parts = [compare(before[i : i + 1], after[i : i + 1], ids[i : i + 1]) for i in range(2)]
    whole, joined = compare(before, after, ids), sum(parts, Tally())
    assert joined.quality().kl == pytest.approx(whole.quality().kl, rel=1e-6)
    assert (joined.same, joined.tokens) == (whole.same, whole.tokens)


def test_an_enormous_loss_is_an_infinite_perplexity() -> None:
    assert Tally(nll_after=800.0, tokens=1).quality().ppl_after == math.inf
    assert math.isnan(Tally(nll_after=math.nan, tokens=1).quality().ppl_after)


def test_perplexity_is_that_of_the_logits() -> None:
    found = perplexity(dense_decoder(), IDS)
    losses = [exact_losses(dense_logits(ids)[None], ids[None]) for ids in IDS]
    assert found.tokens == IDS.shape[0] * (LENGTH - 1)
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_positions_are_stretched_as_the_decoder_does() -> None:
    """Dynamic NTK looks at the length of a sequence."""
    config = changed(CONFIG, rope=RopeConfig(kind="dynamic", factor=4.0, original_length=16), windows=(None, None))
    decoder = decoder_from(config, params(config))
    losses = token_losses(decoder(jnp.asarray(IDS)), IDS)
    assert perplexity(decoder, IDS).nll == pytest.approx(float(losses.mean()), rel=1e-5)


def test_batches_change_nothing() -> None:
    """Three sequences, two at a time: the last batch is short."""
    alone, together = perplexity(dense_decoder(), IDS), perplexity(dense_decoder(), IDS, batch_size=2)
    assert together.nll == pytest.approx(alone.nll, rel=1e-5)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_outputs_compare_as_their_logits(tied: bool) -> None:
    decoder = load_decoder(DEMO) if tied else dense_decoder()
    ids = IDS[:2]
    before, after = outputs(decoder, ids), outputs(decoder, ids, kv_bits=4)
    p, q = (jnp.stack([side.head.logits(jnp.asarray(x)) for x in side.hidden]) for side in (before, after))
    quality, direct = compare_outputs(before, after, ids).quality(), compare(p, q, ids).quality()
    assert quality.kl == pytest.approx(direct.kl, rel=1e-4)
    assert direct.kl > 0
    assert quality.greedy_same == direct.greedy_same
    assert quality.ppl_before == pytest.approx(perplexity(decoder, ids).ppl, rel=1e-5)
    assert quality.ppl_after == pytest.approx(perplexity(decoder, ids, kv_bits=4).ppl, rel=1e-5)


def test_fewer_bits_of_kv_cache_are_further_from_float() -> None:
    kl = {
        bits: compare_outputs(float_outputs(), outputs(dense_decoder(), IDS, kv_bits=bits), IDS).quality().kl
        for bits in (8, 4)
    }
    assert 0 < kl[8] < 1e-3
    assert kl[4] > 30 * kl[8]


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_it_is_the_kv_cache_of_the_engine(bits: int) -> None:
    """One sequence through a real pool of so many bits, whose blocks lie in any order; float pools are far away."""
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(LENGTH, 2, 4, 16)), jnp.float32)
    angles = rotary(RopeConfig(), 16, jnp.arange(LENGTH), jnp.full(LENGTH, LENGTH))
    blocks, places = jnp.array([[2, 0, 1]], jnp.int32), jnp.arange(LENGTH)
    slots = blocks[0, places // 16] * 16 + places % 16
    rows = Rows(blocks, jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH, jnp.int32), LENGTH)
    values, scales = jnp.zeros((3, 2, 2, 16, 2 * bits), jnp.uint8), jnp.zeros((3, 2, 2, 2, 16), jnp.float16)
    paged = attended(PagedContext((rows,), slots, make_mesh(1)), qkv, angles, QuantizedPool(values, scales))
    dense, plain = (attended(context, qkv, angles) for context in (FakeQuantizedKV(1, bits), DenseContext(1)))
    np.testing.assert_allclose(dense, paged, rtol=1e-5, atol=1e-5)
    assert np.abs(dense - plain).max() > 1e-3


def test_the_loaded_demo_is_sure_of_its_reply() -> None:
    """Weights are in place, and losses where they belong: it was trained on replies, and never on questions."""
    text = "<|im_start|>user\nWhat is 3 plus 4?<|im_end|>\n<|im_start|>assistant\n3 + 4 = 7.<|im_end|>"
    decoder, ids = load_decoder(DEMO), np.array([Tokenizer.load(DEMO).encode(text)], np.int32)
    losses = token_losses(decoder(jnp.asarray(ids)), ids)[0]
    reply = 9
    assert max(losses[-reply:]) < 0.1
    assert min(losses[:3]) > 5


def test_impossible_input_is_refused() -> None:
    decoder = dense_decoder()
    with pytest.raises(ConfigError, match="2 tokens or more"):
        perplexity(decoder, IDS[:, :1])
    with pytest.raises(ConfigError, match=f"token={VOCAB} is not in the model's vocabulary of {VOCAB}"):
        perplexity(decoder, np.array([[1, VOCAB]], np.int32))
    with pytest.raises(ConfigError, match="tp=3 must divide 4 query heads"):
        load_decoder(DEMO, tp=3)


def test_logits_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = jnp.full((1, LENGTH, CONFIG.hidden_size), jnp.nan)
    monkeypatch.setattr(evaluate, "_hidden", lambda *_: hidden)
    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(dense_decoder(), IDS)
