"""One decoder layer at a time: its outputs, and what its linear maps are fed.

Layers take and give the hidden states of whole sequences. Each function is compiled once for all layers that look
alike; parameters travel as a mapping from their path within the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.attention import AttentionContext, DenseContext
from jaxdeploy.models.block import Block, BlockConfig
from jaxdeploy.models.linears import put_weight, weight_at
from jaxdeploy.models.model import Positions
from jaxdeploy.models.rope import PositionScheme, rotated
from pallas_kernels.kv_pool import Pool
from pallas_kernels.score_options import ScoreOptions
from pallas_kernels.w8a8_matmul.reference import quantize_tokens

LayerParams = Mapping[tuple[str, ...], jax.Array]
"""Parameters of one layer, float32, by path within it: ``("attention", "wo")``."""


class Sums(NamedTuple):
    """What calibration adds up for the inputs [T, K] of a linear map.

    ``total`` [K] of absolute values, ``peak`` [K] the largest, ``sample`` [picks, K] some of them, ``gram`` [K, K] the
    sum of their outer products, or ``None``.
    """

    total: jax.Array
    peak: jax.Array
    sample: jax.Array
    gram: jax.Array | None


@dataclass(frozen=True)
class LayerForward:
    """The forward pass of a layer.

    ``block``: options of the layer.
    ``width``: size of its hidden states, D.
    ``rounding``: linear maps that round their inputs to int8 per token, as they do at run time with int8 weights.
    """

    block: BlockConfig
    width: int
    rounding: tuple[str, ...] = ()

    def outputs(self, params: LayerParams, x: jax.Array, context: AttentionContext) -> jax.Array:
        """``x`` [B, T, D] → [B, T, D]."""
        out: jax.Array = _outputs(self, dict(params), x, context)
        return out

    def listen(
        self, params: LayerParams, x: jax.Array, picks: jax.Array, names: tuple[str, ...], *, gram: bool
    ) -> dict[str, Sums]:
        """Sums over the inputs of the linear maps ``names``, fed with ``x`` [B, T, D].

        ``picks`` int32 [n] are the tokens, of all B · T, that become the sample.
        """
        heard: dict[str, Sums] = _listen(self, names, gram, dict(params), x, picks)
        return heard

    def kv_range(self, params: LayerParams, x: jax.Array) -> jax.Array:
        """The least and the largest key and value, float32 [2 (key, value), 2 (least, largest)], over ``x`` [B, T, D].

        Keys are those of a KV cache: rotated.
        """
        found: jax.Array = _kv_range(self, dict(params), x)
        return found

    def layer(self, params: Mapping[Any, jax.Array], dtype: jnp.dtype) -> Block:
        """Return the layer's module with ``params`` in ``dtype``."""
        layer = nnx.eval_shape(lambda: self.block.build(self.width, rngs=nnx.Rngs(0), dtype=dtype))
        flat: Any = {path: nnx.Param(value.astype(dtype)) for path, value in params.items()}
        nnx.update(layer, nnx.from_flat_state(flat))
        return layer

    def run(self, layer: Block, x: jax.Array, context: AttentionContext) -> jax.Array:
        """Return the outputs [B, T, D] of ``layer`` for ``x`` [B, T, D]."""
        sequences, length, _ = x.shape
        tables = self.block.positions.tables(*Positions.of_prompts(sequences, length))
        out, _ = layer(x.reshape(sequences * length, -1), tables, context, None)
        return out.reshape(x.shape)


class _Fed:
    """A weight that does something with what it is fed, before it multiplies."""

    def __init__(self, weight: nnx.Param[jax.Array], inputs: int, hook: Callable[[jax.Array], jax.Array]) -> None:
        self._weight, self._inputs, self._hook = weight, inputs, hook

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs]."""
        weight = self._weight[...]
        return jnp.tensordot(self._hook(x).reshape(-1, *weight.shape[: self._inputs]), weight, axes=self._inputs)


def round_tokens(x: jax.Array) -> jax.Array:
    """``x`` [T, K] through int8 with a step for each token, and back."""
    q, steps = quantize_tokens(x)
    return (q.astype(jnp.float32) * steps[:, None]).astype(x.dtype)


def _hook(layer: Block, name: str, hook: Callable[[jax.Array], jax.Array]) -> None:
    """Let ``hook`` see, and change, the inputs of the linear map ``name``."""
    (spec,) = (spec for spec in layer.linears() if spec.name == name)
    weight = weight_at(layer, spec.path)
    assert isinstance(weight, nnx.Param), "a layer under calibration has float weights"
    put_weight(layer, spec.path, _Fed(weight, len(spec.inputs), hook))


@dataclass(frozen=True)
class _Ranges:
    """``DenseContext`` that notes keys and values."""

    dense: DenseContext
    note: Callable[[tuple[jax.Array, jax.Array]], None]

    def attend(
        self, qkv: jax.Array, scheme: PositionScheme, pool: Pool | None, scores: ScoreOptions
    ) -> tuple[jax.Array, Pool | None]:
        """See ``AttentionContext``."""
        self.note((rotated(qkv[:, :, -2], scheme), qkv[:, :, -1]))
        return self.dense.attend(qkv, scheme, pool, scores)


@partial(jax.jit, static_argnums=0)
def _kv_range(forward: LayerForward, params: dict[Any, jax.Array], x: jax.Array) -> jax.Array:
    noted: list[tuple[jax.Array, jax.Array]] = []
    forward.run(forward.layer(params, x.dtype), x, _Ranges(DenseContext(x.shape[0]), noted.append))
    (pair,) = noted
    return jnp.stack([jnp.stack([part.min(), part.max()]) for part in pair]).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _outputs(forward: LayerForward, params: dict[Any, jax.Array], x: jax.Array, context: AttentionContext) -> jax.Array:
    layer = forward.layer(params, x.dtype)
    for name in forward.rounding:
        _hook(layer, name, round_tokens)
    return forward.run(layer, x, context)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _listen(
    forward: LayerForward,
    names: tuple[str, ...],
    gram: bool,
    params: dict[Any, jax.Array],
    x: jax.Array,
    picks: jax.Array,
) -> dict[str, Sums]:
    layer, heard = forward.layer(params, x.dtype), dict[str, jax.Array]()

    def note(name: str, inputs: jax.Array) -> jax.Array:
        heard[name] = inputs
        return inputs

    for name in names:
        _hook(layer, name, partial(note, name))
    forward.run(layer, x, DenseContext(x.shape[0]))
    return {name: _sums(inputs.astype(jnp.float32), picks, gram) for name, inputs in heard.items()}


def _sums(x: jax.Array, picks: jax.Array, gram: bool) -> Sums:
    size = jnp.abs(x)
    outer = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) if gram else None
    return Sums(size.sum(axis=0), size.max(axis=0), x[picks], outer)
