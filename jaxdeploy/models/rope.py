"""Rotary position embeddings, half-split pairing (i, i + H/2), computed in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.target import current_target


class Rotary(NamedTuple):
    """Angles of a rotary embedding. It rotates the first R of a head's H numbers, pairing i with i + R/2.

    Attributes:
        cos: float32 [T, R/2].
        sin: float32 [T, R/2].
    """

    cos: jax.Array
    sin: jax.Array


PositionScheme = Rotary | None
"""How positions enter queries and keys; ``None``: they do not (ALiBi is an option of the scores)."""

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) and how it is stretched to longer contexts.

    ``original_length`` is the context length (tokens) that the stretching starts from. ``attention_factor`` multiplies
    cos and sin (YaRN, arXiv:2309.00071); ``None`` derives it from the other fields.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary position embedding of heads of size ``head_dim``."""

    rope: RopeConfig
    head_dim: int

    def tables(self, positions: jax.Array, lengths: jax.Array) -> Rotary:
        """See ``rotary``."""
        return rotary(self.rope, self.head_dim, positions, lengths)


def rotary(config: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array) -> Rotary:
    """Cos and sin, float32 [T, H/2] each, for tokens at ``positions`` [T].

    ``lengths`` [T] is the prompt length of each token's sequence. Only dynamic NTK reads it: it picks the base once per
    sequence, so that keys in the cache and later queries agree.
    """
    frequencies = _inverse_frequencies(config, head_dim, lengths)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    scale = attention_factor(config)
    return Rotary(_kept(jnp.cos(angles) * scale), _kept(jnp.sin(angles) * scale))


def _kept(table: jax.Array) -> jax.Array:
    """``table`` [T, H/2] as an array that a CPU computes once a step, and not anew for every head of every layer.

    XLA:CPU fuses cos and sin into whatever uses them, through an optimization barrier too. Its fusions end at products,
    and one with the identity changes no float32.
    """
    if current_target().platform != "cpu":
        return table
    return table @ jnp.eye(table.shape[1], dtype=jnp.float32)


def rotated(x: jax.Array, scheme: PositionScheme) -> jax.Array:
    """Return ``x`` [T, heads, H] with each token's position in it; same dtype."""
    if scheme is None:
        return x
    part = 2 * scheme.cos.shape[-1]
    if part < x.shape[-1]:
        return jnp.concatenate([rotated(x[..., :part], scheme), x[..., part:]], axis=-1)
    cos, sin = (table[:, None, :] for table in scheme)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def whole_head(qkv: jax.Array, scheme: PositionScheme) -> tuple[jax.Array, Rotary]:
    """Return ``qkv`` [T, K, N/K + 2, H], and angles [T, H/2] for a kernel that rotates whole heads.

    A scheme that leaves a part of the head alone is applied here; the angles are then 0, which changes nothing.
    """
    tokens, _, vectors, size = qkv.shape
    if scheme is not None and 2 * scheme.cos.shape[-1] == size:
        return qkv, scheme
    turned = rotated(qkv[:, :, :-1].reshape(tokens, -1, size), scheme).reshape(tokens, -1, vectors - 1, size)
    shape = (tokens, size // 2)
    none = Rotary(jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    return jnp.concatenate([turned, qkv[:, :, -1:]], axis=2), none


def attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, but for YaRN (arXiv:2309.00071, §3.4)."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _yarn_mscale(config.factor, config.mscale) / _yarn_mscale(config.factor, config.mscale_all_dim)
    return _yarn_mscale(config.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _inverse_frequencies(config: RopeConfig, head_dim: int, lengths: jax.Array) -> jax.Array:
    """Radians per token, float32 [H/2], or [T, H/2] where they depend on the sequence."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    plain = config.theta**-exponents
    match config.kind:
        case "default":
            return plain
        case "linear":
            return plain / config.factor
        case "dynamic":
            return _dynamic(config, head_dim, exponents, lengths)
        case "llama3":
            return _llama3(config, plain)
        case "yarn":
            return _yarn(config, head_dim, plain)


def _dynamic(config: RopeConfig, head_dim: int, exponents: jax.Array, lengths: jax.Array) -> jax.Array:
    """NTK-aware base that grows once a sequence is longer than the model was trained for."""
    stretch = config.factor * lengths.astype(jnp.float32) / config.original_length - (config.factor - 1.0)
    base = config.theta * jnp.maximum(stretch, 1.0) ** (head_dim / (head_dim - 2))
    return base[:, None] ** -exponents


def _llama3(config: RopeConfig, plain: jax.Array) -> jax.Array:
    """Long wavelengths are divided by ``factor``, short ones kept, those between blended (Llama 3.1)."""
    turns = config.original_length * plain / (2.0 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    keep = jnp.clip((turns - config.low_freq_factor) / span, 0.0, 1.0)
    return plain * (keep + (1.0 - keep) / config.factor)


def _yarn(config: RopeConfig, head_dim: int, plain: jax.Array) -> jax.Array:
    """Frequencies below ``beta_slow`` turns are interpolated, above ``beta_fast`` kept, with a ramp between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(config.original_length / (turns * 2.0 * math.pi)) / (2.0 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001)
    interpolate = jnp.clip(ramp, 0.0, 1.0)
    return plain * (1.0 - interpolate + interpolate / config.factor)
