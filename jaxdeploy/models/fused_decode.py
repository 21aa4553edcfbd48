"""A decode step of a ``Decoder`` in which each layer takes seven launches (``pallas_kernels.decode_layer``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.models.attention import Attention, AttentionConfig, PagedContext, Rows
from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.layer import Layer
from jaxdeploy.models.layers import RMSNorm, Weight
from jaxdeploy.models.leaves import axes_of
from jaxdeploy.models.mlp import MLP, MLPConfig
from jaxdeploy.models.model import Hidden, Model, Positions
from jaxdeploy.models.quantized import Int4Weight
from jaxdeploy.parallel.mesh import TP_AXIS, axis_size
from jaxdeploy.parallel.sharding import per_device, spec
from pallas_kernels.decode_layer import DecodeLayerCall, LayerWeights, ScoreOptions, decode_layer, padded_rows
from pallas_kernels.dispatch import NoBackendError, preferred
from pallas_kernels.kv_pool import Pool
from pallas_kernels.w4a16_matmul.layout import is_packed

KERNELS = "pallas_triton"
"""The backend to go this way for; the op's reference is no faster than layer by layer."""

_OPTIONS = {
    AttentionConfig: frozenset(
        {"num_heads", "num_kv_heads", "head_dim", "rope", "window", "qkv_bias", "o_bias", "kv_copies"}
    ),
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


def refusal_of(model: Model) -> str | None:
    """Return why the kernels cannot compute the layers of ``model`` on this device, or ``None`` if they can."""
    backend = preferred("decode_layer")
    if backend != KERNELS:
        return f"decode_layer runs on {backend} here"
    if type(model) is not Decoder:
        return f"the model is {type(model).__name__}, the fused kernels take {Decoder.__name__}"
    dtype = model.embedding.table.dtype
    for index, layer in enumerate(model.layers):
        if reason := refusal(layer, model.norm, dtype):
            return f"layer {index}: {reason}"
    if len({layer.positions for layer in model.config.layers}) > 1:
        return "the fused kernels take one rotary table for all layers"
    return None


def refusal_of_call(model: Model, mesh: Mesh, pools: Sequence[Any], sequences: int, table_length: int) -> str | None:
    """Return why the kernels do not take the sizes or dtypes of a step of ``sequences``, or ``None`` if they do.

    The step is evaluated abstractly: nothing is compiled, and weights and pools may be abstract.
    """
    graph, weights = nnx.split(model)

    def decode(weights: Any, pools: Sequence[Any], row: jax.Array, tables: jax.Array) -> jax.Array:
        context = PagedContext((Rows(tables, row, row, 1),), row, mesh)
        merged: Model = nnx.merge(graph, weights)
        return decode_hidden(merged, merged.embed(row), Positions(row, row), context, pools).states

    row, tables = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((sequences,), (sequences, table_length)))
    try:
        jax.eval_shape(decode, weights, tuple(pools), row, tables)
    except NoBackendError as reason:
        return str(reason)
    return None


def refusal(layer: Layer, final_norm: RMSNorm, dtype: jnp.dtype) -> str | None:
    """Return why the fused kernels cannot compute ``layer`` and ``final_norm``, or ``None`` if they can.

    ``dtype`` is that of the activations. The kernels compute one fixed block. A module, class or attribute that is not
    in ``_PARTS`` is refused, so that an option added to a model is never ignored.
    """
    if type(layer) is not Layer:
        return f"the layer is {type(layer).__name__}, the fused kernels take {Layer.__name__}"
    unknown = _attributes(layer) - _PARTS.keys()
    parts: dict[str, Any] = {**vars(layer), "final_norm": final_norm}
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
    for name in ("attention_norm", "mlp_norm", "final_norm"):
        scale = parts[name].scale
        if scale.dtype != dtype:  # RMSNorm would multiply in float32
            return f"{name} has a scale in {scale.dtype}, the fused kernels take the activations' {dtype}"
    weights = (layer.attention.wqkv, layer.attention.wo, layer.mlp.gate_up, layer.mlp.down)
    if not all(isinstance(w, nnx.Param) or (isinstance(w, Int4Weight) and w.takes_as_is) for w in weights):
        return "the fused kernels take float weights, and 4-bit weights whose inputs need no reordering or sum"
    return None


def _attributes(module: nnx.Module) -> set[str]:
    """Return the names of a module's attributes. Flax keeps its own under names that begin with an underscore."""
    return {name for name in vars(module) if not name.startswith("_")}


def decode_hidden(
    model: Model,
    x: jax.Array,
    positions: Positions,
    context: PagedContext,
    pools: Sequence[Any],
    selected: jax.Array | None = None,
    taps: tuple[int, ...] = (),
) -> Hidden:
    """Return what ``model.hidden`` returns for one token [B, D] of each sequence.

    The caller has checked with ``refusal_of`` and ``refusal_of_call`` that the kernels compute this model.
    """
    assert selected is None, "a decode step returns the states of all its tokens"
    decoder = cast(Decoder, model)
    angles = decoder.config.layers[0].positions.tables(*positions)
    (rows,) = context.regions
    tokens = x.shape[0]
    where = (rows.block_tables, jnp.where(rows.lengths > 0, rows.first_positions, -1), *angles)
    x = jnp.pad(x, ((0, padded_rows(tokens) - tokens), (0, 0)))
    normed = decoder.layers[0].attention_norm(x)
    updated, residuals = [], []
    norms = [*(layer.attention_norm for layer in decoder.layers[1:]), decoder.norm]
    for layer, next_norm, pool in zip(decoder.layers, norms, pools, strict=True):
        residuals.append(x)
        options, weights = _options(layer, context.mesh), _layer_weights(layer, lambda param: param[...])
        x, normed, pool = _run_layer(options, x, normed, weights, next_norm.scale[...], pool, *where)
        updated.append(pool)
    return Hidden(normed[:tokens], updated, tuple(residuals[index][:tokens] for index in taps))


@dataclass(frozen=True)
class _Options:
    """What is static in a layer.

    Attributes:
        num_heads: of one device.
        scores: of attention.
        eps: of both norms.
        specs: how the weights are cut over the mesh.
        mesh: the devices.
    """

    num_heads: int
    scores: ScoreOptions
    eps: float
    specs: LayerWeights
    mesh: Mesh


def _options(layer: Layer, mesh: Mesh) -> _Options:
    heads = layer.attention.config.num_heads // axis_size(mesh, TP_AXIS)
    specs = _layer_weights(layer, lambda param: spec(*axes_of(param)))
    return _Options(heads, layer.attention.scores, layer.mlp_norm.eps, specs, mesh)


def _layer_weights(layer: Layer, of: Callable[[nnx.Param[jax.Array]], Any]) -> LayerWeights:
    """Return ``of(param)`` for each parameter of a layer that the kernels take."""
    attention, mlp = layer.attention, layer.mlp
    params = {
        "wqkv": _stored(attention.wqkv),
        "bqkv": attention.bqkv,
        "wo": _stored(attention.wo),
        "bo": attention.bo,
        "gate_up": _stored(mlp.gate_up),
        "gate_up_bias": mlp.gate_up_bias,
        "down": _stored(mlp.down),
        "down_bias": mlp.down_bias,
        "mlp_norm": layer.mlp_norm.scale,
    }
    values: dict[str, Any] = {name: None if param is None else of(param) for name, param in params.items()}
    return LayerWeights(**values)


def _stored(weight: Weight) -> nnx.Param[jax.Array]:
    return weight.packed if isinstance(weight, Int4Weight) else cast("nnx.Param[jax.Array]", weight)


@partial(jax.jit, static_argnums=0)
def _run_layer(options: _Options, *args: Any) -> tuple[jax.Array, jax.Array, Pool]:
    """One layer under its own ``jit``: equal layers are traced and lowered once, however many there are."""
    whole, pool = spec(), spec(*HeadsLayout.AXES)
    ins = (whole, whole, options.specs, whole, pool, whole, whole, whole, whole)
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
    call = DecodeLayerCall(
        *(x, normed, matrices, next_norm, *where),
        scores=options.scores,
        num_heads=options.num_heads,
        eps=options.eps,
        axis_name=TP_AXIS if axis_size(options.mesh, TP_AXIS) > 1 else None,
    )
    return decode_layer(call, backend=KERNELS)


def _matrix(weight: jax.Array, inputs: int) -> jax.Array:
    if is_packed(weight):
        return weight.reshape(*weight.shape[:2], -1)
    return weight.reshape(math.prod(weight.shape[:inputs]), -1)


def _flat(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.reshape(-1)
