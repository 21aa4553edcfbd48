"""What a decoder makes of a text: its perplexity, and how far it is from another decoder on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.checkpoint.model import LoadOptions, float_dtype, load_model
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.compress.report import Quality
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.models.attention import AttentionContext, DenseContext, dense_attention
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.layers import Embedding, Head
from jaxdeploy.models.model import Positions
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.rope import PositionScheme, rotated
from jaxdeploy.models.weights import tensor_parallel
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.kv_pool import Pool, dequantize, quantize
from pallas_kernels.score_options import ScoreOptions

ROWS = 128
"""Rows of V logits that are worked on at a time: what lies between logits and losses is never larger than that."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Perplexity:
    """``nll`` is the mean −log p (nats) of ``tokens`` predicted tokens, ``ppl`` = e^nll."""

    nll: float
    tokens: int

    @property
    def ppl(self) -> float:
        """Perplexity: the number of equally likely tokens that would be as hard to guess."""
        return _exp(self.nll)


@dataclass(frozen=True)
class Tally:
    """Sums over the positions where two decoders, before and after, were compared; tallies add up."""

    nll_before: float = 0.0
    nll_after: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        before, after, kl = (mine + its for mine, its in zip(self._sums, other._sums, strict=True))
        return Tally(before, after, kl, self.same + other.same, self.tokens + other.tokens)

    @property
    def _sums(self) -> tuple[float, float, float]:
        return self.nll_before, self.nll_after, self.kl

    def quality(self) -> Quality:
        """The means. At least one position was counted."""
        before, after, kl = (total / self.tokens for total in self._sums)
        return Quality(self.tokens, _exp(before), _exp(after), kl, self.same / self.tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuantizedKV:
    """``DenseContext`` over keys and values that went through a KV cache of ``bits`` (8 or 4) and back.

    As in a quantised pool, rotated keys and values are rounded per token and head, those of the token itself too.
    """

    sequences: int = field(metadata={"static": True})
    bits: int = field(metadata={"static": True})

    def attend(
        self, qkv: jax.Array, scheme: PositionScheme, pool: Pool | None, scores: ScoreOptions
    ) -> tuple[jax.Array, Pool | None]:
        """See ``AttentionContext``."""
        tokens, _, _, size = qkv.shape
        q = rotated(qkv[:, :, :-2].reshape(tokens, -1, size), scheme)
        k, v = self._cached(rotated(qkv[:, :, -2], scheme)), self._cached(qkv[:, :, -1])
        batched = (x.reshape(self.sequences, -1, *x.shape[1:]) for x in (q, k, v))
        return dense_attention(*batched, scores=scores).reshape(q.shape), pool

    def _cached(self, x: jax.Array) -> jax.Array:
        return dequantize(*quantize(x, self.bits), self.bits).astype(x.dtype)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a decoder says about some sequences, small enough to outlive its layers.

    ``hidden`` [S, T, D] is the normed hidden state of every token, on the host; ``head`` makes logits of it.
    """

    hidden: Array
    head: Embedding | Head


def load_decoder(
    folder: Path, *, dtype: str = "auto", tp: int = 1, model_format: str | None = None, progress: bool = False
) -> Decoder:
    """Return the decoder of a checkpoint folder. ``dtype`` as in ``EngineConfig``.

    Raises ``ConfigError``, ``CheckpointError``, ``UnsupportedModelError``.
    """
    hf, mesh = read_hf_config(folder, model_format), make_mesh(tp)
    model = tensor_parallel(family_of(hf).model_config(hf), tp)
    options = LoadOptions(float_dtype(dtype, model, mesh), model_format, progress=progress)
    return load_model(folder, hf, mesh, options, model)


def perplexity(
    decoder: Decoder,
    ids: Array,
    *,
    scored: Array | None = None,
    batch_size: int = 1,
    kv_bits: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity over the sequences ``ids`` int32 [S, T], each without what came before it; its first token is given.

    ``scored`` bool [S, T] says which tokens count, as those of replies (default: all). ``batch_size`` sequences go
    through the decoder together. ``kv_bits`` 8 or 4 shows what such a KV cache costs.

    Raises:
        ConfigError: A sequence is shorter than 2 tokens, a token is not in the model's vocabulary, or none counts.
        CheckpointError: The logits are not finite.
    """
    graph, weights = nnx.split(_head(decoder))
    batches = _hidden_batches(decoder, ids, batch_size, kv_bits, progress)
    losses = np.concatenate([np.asarray(_head_losses(graph, weights, hidden, batch)) for batch, hidden in batches])
    counted = losses[_counted(ids, scored)]
    if not counted.size:
        raise ConfigError("scored leaves no token to predict; mark one that is not the first of its sequence")
    nll = float(counted.mean(dtype=np.float64))
    if not math.isfinite(nll):
        raise CheckpointError("the model's logits are not finite; its weights are damaged, or need dtype=float32")
    return Perplexity(nll, counted.size)


def outputs(
    decoder: Decoder, ids: Array, *, batch_size: int = 1, kv_bits: int | None = None, progress: bool = False
) -> Outputs:
    """Run ``decoder`` over ``ids`` int32 [S, T] as ``perplexity`` does, and keep what ``compare_outputs`` needs.

    Raises:
        ConfigError: A sequence is shorter than 2 tokens, or a token is not in the model's vocabulary.
    """
    batches = _hidden_batches(decoder, ids, batch_size, kv_bits, progress)
    return Outputs(np.concatenate([np.asarray(hidden) for _, hidden in batches]), _head(decoder))


def compare_outputs(before: Outputs, after: Outputs, ids: Array, scored: Array | None = None) -> Tally:
    """``compare``, sequence by sequence, without ever holding all logits of one. ``ids`` are those of the outputs."""
    heads = [nnx.split(side.head) for side in (before, after)]
    graphs, weights = tuple(graph for graph, _ in heads), tuple(state for _, state in heads)
    tally, counted = Tally(), _counted(ids, scored)
    for index in range(ids.shape[0]):
        piece = slice(index, index + 1)
        hidden = (jnp.asarray(before.hidden[piece]), jnp.asarray(after.hidden[piece]))
        tally += _tally(_head_compared(graphs, weights, hidden, jnp.asarray(ids[piece])), counted[piece])
    return tally


def compare(
    before: jax.Array | Array, after: jax.Array | Array, ids: jax.Array | Array, scored: Array | None = None
) -> Tally:
    """Two decoders' logits float32 [B, T, V] for the same ``ids`` int32 [B, T].

    Counted are the B · (T − 1) positions that have a next token, or those whose next token ``scored`` bool [B, T]
    marks. KL is KL(before ‖ after) in nats.
    """
    return _tally(_compared_logits(before, after, ids), _counted(ids, scored))


@jax.jit
def token_losses(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """−log p, in nats, of every token but the first.

    ``logits`` float32 [B, T, V] (position t is about token t + 1), ``ids`` int32 [B, T] → float32 [B, T − 1].
    """
    losses: jax.Array = _by_rows(_losses, ids, logits)
    return losses


class _Compared(NamedTuple):
    """For each position the −log p of both, KL, and whether the likeliest token is the same."""

    nll_before: jax.Array
    nll_after: jax.Array
    kl: jax.Array
    same: jax.Array


def _losses(targets: jax.Array, logits: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _compare_rows(targets: jax.Array, before: jax.Array, after: jax.Array) -> _Compared:
    log_p, log_q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    p = jnp.exp(log_p)
    kl = jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=-1)
    same = before.argmax(axis=-1) == after.argmax(axis=-1)
    return _Compared(_losses(targets, before), _losses(targets, after), kl, same)


def _by_rows(f: Callable[..., Any], ids: jax.Array, *arrays: jax.Array) -> Any:
    """``f(targets [R], *rows [R, ...])`` → arrays [R], over [B, T, ...] ``arrays`` in chunks of rows → [B, T − 1].

    ``targets`` are the next tokens. The last chunk begins early enough to be whole; what it repeats is the same.
    """
    sequences, length = ids.shape
    rows = [jnp.roll(ids, -1, axis=1).reshape(-1), *(array.reshape(-1, array.shape[-1]) for array in arrays)]
    count, size = sequences * length, min(ROWS, sequences * length)
    starts = jnp.minimum(jnp.arange(0, count, size), count - size)
    chunks = jax.lax.map(lambda start: f(*(jax.lax.dynamic_slice_in_dim(row, start, size) for row in rows)), starts)
    places = starts[:, None] + jnp.arange(size)

    def in_order(chunk: jax.Array) -> jax.Array:
        return jnp.zeros(count, chunk.dtype).at[places].set(chunk).reshape(sequences, length)[:, :-1]

    return jax.tree.map(in_order, chunks)


@jax.jit
def _compared_logits(before: jax.Array, after: jax.Array, ids: jax.Array) -> _Compared:
    compared: _Compared = _by_rows(_compare_rows, ids, before, after)
    return compared


@partial(jax.jit, static_argnums=0)
def _head_losses(graph: Any, weights: Any, hidden: jax.Array, ids: jax.Array) -> jax.Array:
    head = nnx.merge(graph, weights)
    losses: jax.Array = _by_rows(lambda targets, x: _losses(targets, head.logits(x)), ids, hidden)
    return losses


@partial(jax.jit, static_argnums=0)
def _head_compared(graphs: Any, weights: Any, hidden: tuple[jax.Array, jax.Array], ids: jax.Array) -> _Compared:
    heads = [nnx.merge(*parts) for parts in zip(graphs, weights, strict=True)]

    def rows(targets: jax.Array, *xs: jax.Array) -> _Compared:
        return _compare_rows(targets, *(head.logits(x) for head, x in zip(heads, xs, strict=True)))

    compared: _Compared = _by_rows(rows, ids, *hidden)
    return compared


def _tally(compared: _Compared, counted: Array) -> Tally:
    nll_before, nll_after, kl = (float(np.asarray(part)[counted].sum(dtype=np.float64)) for part in compared[:3])
    return Tally(nll_before, nll_after, kl, int(np.asarray(compared.same)[counted].sum()), int(counted.sum()))


def _counted(ids: jax.Array | Array, scored: Array | None) -> Array:
    """Which predictions count, bool [S, T − 1]: those of the tokens that ``scored`` marks, or all."""
    return (np.ones(ids.shape, np.bool_) if scored is None else scored)[:, 1:]


def _exp(nll: float) -> float:
    """e^nll; infinite where no float can hold it."""
    return math.inf if nll > 700 else math.exp(nll)


def _head(decoder: Decoder) -> Embedding | Head:
    return decoder.embedding if decoder.config.tie_embeddings else decoder.head


def _hidden_batches(
    decoder: Decoder, ids: Array, batch_size: int, kv_bits: int | None, progress: bool
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Batches of ``ids`` [B, T] with their hidden states [B, T, D]."""
    from tqdm import tqdm

    _check_ids(decoder, ids)
    graph, weights = nnx.split(decoder)
    with tqdm(total=ids.shape[0], desc="evaluating", unit="sequence", disable=not progress, leave=False) as bar:
        for start in range(0, ids.shape[0], batch_size):
            batch = jnp.asarray(ids[start : start + batch_size], jnp.int32)
            yield batch, _hidden(graph, weights, batch, kv_bits)
            bar.update(batch.shape[0])


def _check_ids(decoder: Decoder, ids: Array) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ConfigError(f"ids of shape {ids.shape} must be sequences of 2 tokens or more; give a longer text")
    vocab, last = decoder.config.vocab_size, int(ids.max())
    if last >= vocab:
        raise ConfigError(f"token={last} is not in the model's vocabulary of {vocab}; use its own tokenizer")


@partial(jax.jit, static_argnums=(0, 3))
def _hidden(graph: nnx.GraphDef[Decoder], weights: Any, ids: jax.Array, kv_bits: int | None) -> jax.Array:
    """Whole sequences ``ids`` [B, T] through the layers → [B, T, D]."""
    decoder = nnx.merge(graph, weights)
    sequences, length = ids.shape
    context: AttentionContext = DenseContext(sequences) if kv_bits is None else FakeQuantizedKV(sequences, kv_bits)
    pools = [None] * len(decoder.layers)
    x = decoder.embed(ids.reshape(-1))
    hidden = decoder.hidden(x, Positions.of_prompts(sequences, length), context, pools)
    return hidden.states.reshape(sequences, length, -1)
