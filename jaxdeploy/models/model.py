"""What a step needs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxdeploy.models.attention import PagedContext
from jaxdeploy.models.cache_layout import CacheLayout
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Embedding

Pools = Sequence[Any]
"""The pool of each layer, as its ``CacheLayout`` describes it; ``None`` without a cache."""


class Positions(NamedTuple):
    """Positions of a step's T tokens.

    Attributes:
        values: int32 [T], the position of each token in its sequence. M-RoPE (arXiv:2409.12191) has three positions
            for each token: [3, T].
        prompt_lengths: int32 [T], the prompt length of each token's sequence. Dynamic NTK scaling depends on it.
    """

    values: jax.Array
    prompt_lengths: jax.Array

    @classmethod
    def of_prompts(cls, count: int, length: int) -> Positions:
        """Return the positions of ``count`` prompts of ``length`` tokens, one after the other."""
        values = jnp.tile(jnp.arange(length, dtype=jnp.int32), count)
        return cls(values, jnp.full_like(values, length))


class Hidden(NamedTuple):
    """Hidden states of a step.

    Attributes:
        states: normed, [T, D], or [B, D] of the selected tokens.
        pools: the updated pools.
        tapped: the residual stream [T, D] before each of the tapped layers, in the order of ``taps``.
    """

    states: jax.Array
    pools: Pools
    tapped: tuple[jax.Array, ...] = ()


class Encoder(Protocol):
    """Computes the embeddings of an image or another medium."""

    def __call__(self, data: jax.Array) -> jax.Array:
        """Return the embeddings [rows, D] of ``data``."""
        ...


class Model(Protocol):
    """A model that a step can run: ``embed``, then ``hidden``, then ``logits``.

    Attributes:
        config: its sizes.
        embedding: the table of token embeddings.
        encoders: medium, such as ``"image"`` → its encoder. A text model has none.
    """

    config: ModelConfig
    embedding: Embedding

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See the class."""
        ...

    @property
    def cache_layouts(self) -> tuple[CacheLayout, ...]:
        """What each layer keeps in the cache, one layout for each pool that ``hidden`` takes."""
        ...

    def embed(self, tokens: jax.Array, media_rows: jax.Array | None = None) -> jax.Array:
        """Return the embeddings [T, D] of ``tokens`` int32 [T].

        ``media_rows`` int32 [T] are rows of the media buffer that replace token embeddings, −1 for none. No step
        passes it yet.
        """
        ...

    def hidden(
        self,
        x: jax.Array,
        positions: Positions,
        context: PagedContext,
        pools: Pools,
        selected: jax.Array | None = None,
        taps: tuple[int, ...] = (),
    ) -> Hidden:
        """Run the layers over embeddings.

        Args:
            x: [T, D].
            positions: of the T tokens.
            context: how attention finds keys and values.
            pools: one for each layer.
            selected: int32 [B], tokens whose hidden states are returned; ``None`` for all. The last layer computes only
                keys and values for other tokens.
            taps: indices of layers before which the residual stream is returned.
        """
        ...

    def logits(self, x: jax.Array) -> jax.Array:
        """Return float32 logits [T, V] of hidden states [T, D]."""
        ...
