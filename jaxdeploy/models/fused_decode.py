"""The decoder over one new token of every sequence, each layer in seven launches (``pallas_kernels.decode_layer``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.attention import Attention, AttentionConfig, AttentionContext, PagedContext
from jaxdeploy.models.layers import RMSNorm, Weight, value_of
from jaxdeploy.models.mlp import MLP, MLPConfig
from jaxdeploy.models.quantized import Int4Weight
from jaxdeploy.models.rope import Rotary
from jaxdeploy.parallel.mesh import TP_AXIS
from jaxdeploy.parallel.sharding import POOL_AXES, per_device, spec
from pallas_kernels.decode_layer import LayerWeights, decode_layer, padded_rows
from pallas_kernels.decode_layer.weights import is_packed
from pallas_kernels.dispatch import preferred
from pallas_kernels.kv_pool import Pool

if TYPE_CHECKING:
    from jaxdeploy.models.layer import Layer

logger = logging.getLogger("jaxdeploy")

KERNELS = "pallas_triton"
"""The backend to go this way for; the op's reference is no faster than layer by layer."""

_AXES: dict[str, tuple[str | None, ...]] = {
    "wqkv": ("embed", "kv_heads"),
    "bqkv": ("kv_heads",),
    "wo": ("heads", None, "embed"),
    "bo": ("embed",),
    "gate_up": ("embed", None, "mlp"),
    "gate_up_bias": (None, "mlp"),
    "down": ("mlp", "embed"),
    "down_bias": ("embed",),
    "mlp_norm": ("embed",),
}
"""Logical axes of a layer's parameters, in the shapes they have in the modules."""

_INPUT_AXES = {"wo": 2}
"""Axes of a weight that are inputs, where that is not the first alone."""


_OPTIONS = {
    AttentionConfig: frozenset({"num_heads", "num_kv_heads", "head_dim", "rope", "window", "qkv_bias", "o_bias"}),
    MLPConfig: frozenset({"intermediate_size", "bias"}),
}
"""The options of modules that the kernels honour."""

_PARTS: dict[str, tuple[type[nnx.Module], frozenset[str]]] = {
    "attention_norm": (RMSNorm, frozenset({"scale", "eps"})),
    "attention": (Attention, frozenset({"config", "width", "inputs", "wqkv", "bqkv", "wo", "bo"})),
    "mlp_norm": (RMSNorm, frozenset({"scale", "eps"})),
    "mlp": (MLP, frozenset({"config", "width", "gate_up", "gate_up_bias", "down", "down_bias"})),
}
"""Modules of a layer that the kernels compute: the exact class of each, and all attributes that they honour."""


def serves(context: AttentionContext, layers: Sequence[Layer], norm: RMSNorm) -> TypeGuard[PagedContext]:
    """Return whether the fused kernels run this step: single tokens over a paged cache, on a device that has them."""
    if not isinstance(context, PagedContext) or [rows.query_length for rows in context.regions] != [1]:
        return False
    if preferred("decode_layer") != KERNELS:
        return False
    for index, layer in enumerate(layers):
        if reason := refusal(layer, norm):
            logger.info("decode steps run op by op: layer %d: %s", index, reason)
            return False
    if len({layer.attention.config.positions for layer in layers}) > 1:
        logger.info("decode steps run op by op: the fused kernels take one rotary table for all layers")
        return False
    return True


def refusal(layer: Layer, final_norm: RMSNorm) -> str | None:
    """Return why the fused kernels cannot compute ``layer`` and ``final_norm``, or ``None`` if they can.

    The kernels compute one fixed block. A module, class or attribute that is not in ``_PARTS`` is refused, so that an
    option added to a model is never ignored.
    """
    unknown = _attributes(layer) - _PARTS.keys()
    parts = {**vars(layer), "final_norm": final_norm}
    for name, (kind, known) in {**_PARTS, "final_norm": _PARTS["mlp_norm"]}.items():
        part = parts[name]
        if type(part) is not kind:
            return f"{name} is {type(part).__name__}, the fused kernels take {kind.__name__}"
        unknown |= {f"{name}.{attribute}" for attribute in _attributes(part) - known}
    for name, config in (("attention", layer.attention.config), ("mlp", layer.mlp.config)):
        unknown |= {f"{name}.{option}" for option in vars(config).keys() - _OPTIONS.get(type(config), frozenset())}
    if unknown:
        return f"the fused kernels do not take {', '.join(sorted(unknown))}"
    if not layer.attention_norm.eps == layer.mlp_norm.eps == final_norm.eps:
        return "the fused kernels take one eps for all norms"
    weights = (layer.attention.wqkv, layer.attention.wo, layer.mlp.gate_up, layer.mlp.down)
    if not all(isinstance(w, nnx.Param) or (isinstance(w, Int4Weight) and w.takes_as_is) for w in weights):
        return "the fused kernels take float weights, and 4-bit weights whose inputs need no reordering or sum"
    return None


def _attributes(module: nnx.Module) -> set[str]:
    """Return the names of a module's attributes. Flax keeps its own under names that begin with an underscore."""
    return {name for name in vars(module) if not name.startswith("_")}


def decode_hidden(
    layers: Sequence[Layer],
    norm: RMSNorm,
    x: jax.Array,
    rotary: Rotary,
    context: PagedContext,
    pools: Sequence[Any],
    noted: dict[int, jax.Array] | None = None,
) -> tuple[jax.Array, list[Any]]:
    """The normed hidden state [B, D] of B new tokens whose embeddings are ``x``, and the updated pools.

    ``noted`` is that of ``Decoder.hidden``.

    Raises ``NoBackendError`` where the kernels do not do such a model: its sizes, its dtype.
    """
    (rows,) = context.regions
    tokens = x.shape[0]
    where = (rows.block_tables, jnp.where(rows.lengths > 0, rows.first_positions, -1), *rotary)
    x = jnp.pad(x, ((0, padded_rows(tokens) - tokens), (0, 0)))
    normed, updated = layers[0].attention_norm(x), []
    norms = [*(layer.attention_norm for layer in layers[1:]), norm]
    for index, (layer, next_norm, pool) in enumerate(zip(layers, norms, pools, strict=True)):
        if noted is not None and index in noted:
            noted[index] = x[:tokens]
        options = _options(layer, context.mesh)
        x, normed, pool = _run_layer(options, x, normed, _weights(layer), next_norm.scale[...], pool, *where)
        updated.append(pool)
    return normed[:tokens], updated


@dataclass(frozen=True)
class _Options:
    """What is static about a layer; ``num_heads`` of one device."""

    num_heads: int
    scale: float
    eps: float
    window: int | None
    mesh: Mesh


def _options(layer: Layer, mesh: Mesh) -> _Options:
    attention = layer.attention.config
    heads = attention.num_heads // mesh.size
    return _Options(heads, 1.0 / math.sqrt(attention.head_dim), layer.mlp_norm.eps, attention.window, mesh)


def _weights(layer: Layer) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    return LayerWeights(
        wqkv=_array(attention.wqkv),
        bqkv=value_of(attention.bqkv),
        wo=_array(attention.wo),
        bo=value_of(attention.bo),
        gate_up=_array(mlp.gate_up),
        gate_up_bias=value_of(mlp.gate_up_bias),
        down=_array(mlp.down),
        down_bias=value_of(mlp.down_bias),
        mlp_norm=layer.mlp_norm.scale[...],
    )


def _array(weight: Weight) -> jax.Array:
    return weight.packed[...] if isinstance(weight, Int4Weight) else cast("nnx.Param[jax.Array]", weight)[...]


def _specs(weights: LayerWeights) -> LayerWeights:
    """Where each array is cut; a packed weight has one input axis, and behind it one for words and scales."""
    specs: dict[str, Any] = {}
    for name, axes in _AXES.items():
        array = getattr(weights, name)
        packed = array is not None and is_packed(array)
        specs[name] = spec(axes[0], None, *axes[_INPUT_AXES.get(name, 1) :]) if packed else spec(*axes)
    return LayerWeights(**specs)


@partial(jax.jit, static_argnums=0)
def _run_layer(options: _Options, *args: Any) -> tuple[jax.Array, jax.Array, Pool]:
    """One layer under its own ``jit``: equal layers are traced and lowered once, however many there are."""
    whole, pool = spec(), spec(*POOL_AXES)
    ins = (whole, whole, _specs(args[2]), whole, pool, whole, whole, whole, whole)
    layer = per_device(options.mesh, partial(_layer, options), ins, (whole, whole, pool))
    out: tuple[jax.Array, jax.Array, Pool] = layer(*args)
    return out


def _layer(
    options: _Options, x: jax.Array, normed: jax.Array, weights: LayerWeights, next_norm: jax.Array, *where: Any
) -> tuple[jax.Array, jax.Array, Pool]:
    """One device's share of a layer; its weights become matrices, which moves nothing."""
    matrices = LayerWeights(
        wqkv=_matrix(weights.wqkv, 1),
        bqkv=_flat(weights.bqkv),
        wo=_matrix(weights.wo, 2),
        bo=weights.bo,
        gate_up=_matrix(weights.gate_up, 1),
        gate_up_bias=_flat(weights.gate_up_bias),
        down=weights.down,
        down_bias=weights.down_bias,
        mlp_norm=weights.mlp_norm,
    )
    return decode_layer(
        x,
        normed,
        matrices,
        next_norm,
        *where,
        num_heads=options.num_heads,
        scale=options.scale,
        eps=options.eps,
        window=options.window,
        axis_name=TP_AXIS if options.mesh.size > 1 else None,
        backend=KERNELS,
    )


def _matrix(weight: jax.Array, inputs: int) -> jax.Array:
    if is_packed(weight):
        return weight.reshape(*weight.shape[:2], -1)
    return weight.reshape(math.prod(weight.shape[:inputs]), -1)


def _flat(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.reshape(-1)
