"""One decoder layer at a time: its outputs, and what its linear maps are fed.

Layers take and give the hidden states of whole sequences. Each function is compiled once for all layers that look
alike; parameters travel as a mapping from their path within the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdeploy.models.attention import AttentionContext, DenseContext
from jaxdeploy.models.block import Block, BlockConfig
from jaxdeploy.models.linears import LinearSpec, put_weight, weight_at
from jaxdeploy.models.model import Positions
from jaxdeploy.models.rope import PositionScheme, rotated
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

    def run(self, layer: Block, x: jax.Array, context: AttentionContext) -> tuple[jax.Array, Any]:
        """Return the outputs [B, T, D] of ``layer`` for ``x`` [B, T, D], and the pool that ``context`` updated."""
        sequences, length, _ = x.shape
        tables = self.block.positions.tables(*Positions.of_prompts(sequences, length))
        out, pool = layer(x.reshape(sequences * length, -1), tables, context, None)
        return out.reshape(x.shape), pool


class _Recorder:
    """A float weight that keeps its inputs [T, K] of the last product."""

    def __init__(self, weight: nnx.Param[jax.Array], spec: LinearSpec) -> None:
        self.weight, self.spec = weight, spec
        self.inputs: jax.Array | None = None

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs]."""
        self.inputs = x
        return _product(self.weight, self.spec, x)


class _InputRounder:
    """A float weight that rounds its inputs to int8 per token."""

    def __init__(self, weight: nnx.Param[jax.Array], spec: LinearSpec) -> None:
        self.weight, self.spec = weight, spec

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs]."""
        return _product(self.weight, self.spec, round_tokens(x))


def _product(weight: nnx.Param[jax.Array], spec: LinearSpec, x: jax.Array) -> jax.Array:
    return jnp.tensordot(x.reshape(-1, *spec.inputs), weight[...], axes=len(spec.inputs))


def round_tokens(x: jax.Array) -> jax.Array:
    """``x`` [T, K] through int8 with a step for each token, and back."""
    q, steps = quantize_tokens(x)
    return (q.astype(jnp.float32) * steps[:, None]).astype(x.dtype)


W = TypeVar("W")


def _replace(layer: Block, names: Iterable[str], kind: Callable[[nnx.Param[jax.Array], LinearSpec], W]) -> dict[str, W]:
    """Put a ``kind`` in place of the weights ``names`` of ``layer``, and return them."""
    specs = {spec.name: spec for spec in layer.linears()}
    replaced = {}
    for name in names:
        weight = weight_at(layer, specs[name].path)
        assert isinstance(weight, nnx.Param), "a layer under calibration has float weights"
        replaced[name] = kind(weight, specs[name])
        put_weight(layer, specs[name].path, replaced[name])
    return replaced


@dataclass(frozen=True)
class _KeysAndValues:
    """``DenseContext`` that returns keys, as a cache has them, and values [T, K, H] in place of the updated pool."""

    dense: DenseContext

    def attend(self, qkv: jax.Array, scheme: PositionScheme, pool: Any, scores: ScoreOptions) -> tuple[jax.Array, Any]:
        """See ``AttentionContext``."""
        attended, _ = self.dense.attend(qkv, scheme, pool, scores)
        return attended, (rotated(qkv[:, :, -2], scheme), qkv[:, :, -1])


@partial(jax.jit, static_argnums=0)
def _kv_range(forward: LayerForward, params: dict[Any, jax.Array], x: jax.Array) -> jax.Array:
    context = _KeysAndValues(DenseContext(x.shape[0]))
    _, pair = forward.run(forward.layer(params, x.dtype), x, context)
    return jnp.stack([jnp.stack([part.min(), part.max()]) for part in pair]).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _outputs(forward: LayerForward, params: dict[Any, jax.Array], x: jax.Array, context: AttentionContext) -> jax.Array:
    layer = forward.layer(params, x.dtype)
    _replace(layer, forward.rounding, _InputRounder)
    return forward.run(layer, x, context)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _listen(
    forward: LayerForward,
    names: tuple[str, ...],
    gram: bool,
    params: dict[Any, jax.Array],
    x: jax.Array,
    picks: jax.Array,
) -> dict[str, Sums]:
    layer = forward.layer(params, x.dtype)
    recorders = _replace(layer, names, _Recorder)
    forward.run(layer, x, DenseContext(x.shape[0]))
    found = {}
    for name, recorder in recorders.items():
        assert recorder.inputs is not None, f"the layer does not use {name}"
        found[name] = _sums(recorder.inputs.astype(jnp.float32), picks, gram)
    return found


def _sums(x: jax.Array, picks: jax.Array, gram: bool) -> Sums:
    size = jnp.abs(x)
    outer = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) if gram else None
    return Sums(size.sum(axis=0), size.max(axis=0), x[picks], outer)
