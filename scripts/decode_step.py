"""A decode step of a Llama-shaped model made of ``decode_layer``, for the static check and for tests.

The engine has its own step. This one adds only an embedding, the last norm, the head and an argmax to the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.decode_layer import DecodeLayerCall, ScoreOptions, decode_layer, padded_rows
from pallas_kernels.decode_layer.shapes import Shape, make_pool, make_weight, model_shape, rotary
from pallas_kernels.decode_layer.tiles import Tiles
from pallas_kernels.decode_layer.weights import LayerWeights, weight_shape
from pallas_kernels.kv_pool import Pool
from pallas_kernels.offline import Program, compile_for, compile_on_mesh, offline_mesh

EPS, THETA = 1e-5, 500000.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepParams:
    """A model's weights.

    Attributes:
        embed: [V, D].
        layers: one ``LayerWeights`` a layer.
        norms: [D] each: the first norm of every layer, then the last norm of all.
        head: [D, V]; under tensor parallelism this device's columns.
    """

    embed: jax.Array
    layers: tuple[LayerWeights, ...]
    norms: tuple[jax.Array, ...]
    head: jax.Array


jitted_layer = jax.jit(decode_layer, static_argnames=("backend", "tiles"))
"""Traced and lowered once for all layers, which XLA then inlines."""


@dataclass(frozen=True)
class StepOptions:
    """Static options of a step.

    Attributes:
        head_dim: H.
        axis_name: inside ``shard_map``, the mesh axis that heads, MLP and vocabulary are sharded over.
        backend: of ``decode_layer``.
        tiles: of ``decode_layer``.
    """

    head_dim: int
    axis_name: str | None = None
    backend: str | None = None
    tiles: Tiles | None = None


def decode_step(
    options: StepOptions,
    params: StepParams,
    pools: tuple[Pool, ...],
    tokens: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
) -> tuple[jax.Array, tuple[Pool, ...]]:
    """Return the most likely next token of every sequence.

    Args:
        options: static ones.
        params: of the model.
        pools: one per layer; donate them.
        tokens: int32 [B], the last token of each sequence.
        positions: int32 [B], the position of that token; −1 for a row without a token.
        block_tables: int32 [B, M].

    Returns:
        (int32 [B] next tokens, pools).
    """
    batch = tokens.shape[0]
    x = jnp.zeros((padded_rows(batch), params.embed.shape[1]), params.embed.dtype).at[:batch].set(params.embed[tokens])
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + EPS)
    normed = (wide * factor).astype(x.dtype) * params.norms[0]
    cos, sin = rotary(jnp.maximum(positions, 0), options.head_dim, THETA)
    written = []
    for weights, pool, norm in zip(params.layers, pools, params.norms[1:], strict=True):
        call = DecodeLayerCall(
            x=x,
            normed=normed,
            weights=weights,
            next_norm=norm,
            pool=pool,
            block_tables=block_tables,
            positions=positions,
            cos=cos,
            sin=sin,
            scores=ScoreOptions(options.head_dim**-0.5),
            num_heads=weight_shape(weights.wo)[0] // options.head_dim,
            eps=EPS,
            axis_name=options.axis_name,
        )
        x, normed, pool = jitted_layer(call, backend=options.backend, tiles=options.tiles)
        written.append(pool)
    return _most_likely(normed, params.head, options.axis_name)[:batch], tuple(written)


def sharded_decode_step(
    options: StepOptions, params: StepParams, pools: tuple[Pool, ...], mesh: Mesh
) -> Callable[..., Any]:
    """``decode_step`` over all devices of ``mesh``'s only axis; ``params`` and ``pools`` are read for their structure.

    Columns of ``gate_up`` are ordered by device: those of a device's gate, then those of its up.
    """
    (axis,) = mesh.axis_names
    specs, pool_specs = partition(params, axis), _pool_specs(pools, axis)
    return jax.shard_map(
        partial(decode_step, replace(options, axis_name=axis)),
        mesh=mesh,
        in_specs=(specs, pool_specs, P(), P(), P()),
        out_specs=(P(), pool_specs),
        check_vma=False,
    )


def partition(params: StepParams | LayerWeights, axis: str) -> Any:
    """How ``params`` are spread over a mesh ``axis``: columns of QKV, gate, up and head, rows of what follows them."""
    columns = {"wqkv", "gate_up", "bqkv", "gate_up_bias"}

    def spec(path: tuple[Any, ...], leaf: jax.Array) -> P:
        name = path[-1].name if isinstance(path[-1], jax.tree_util.GetAttrKey) else ""
        if name in columns or name == "head":
            return P(*(None,) * (leaf.ndim - 1), axis)
        return P(axis) if name in ("wo", "down") else P()

    return jax.tree_util.tree_map_with_path(spec, params)


def abstract_step_args(
    shape: Shape, *, layers: int, vocab: int, blocks: int, mesh: Mesh | None = None
) -> tuple[Any, ...]:
    """``ShapeDtypeStruct``s for ``decode_step``: B and each layer as ``shape`` says, in pools of ``blocks``."""
    dtype = jnp.dtype(shape.dtype)

    def make() -> tuple[Any, ...]:
        key = jax.random.key(0)
        norm = jnp.ones((shape.hidden,), dtype)
        weights = {name: make_weight(key, *size, shape.group, dtype) for name, size in shape.linears.items()}
        layer = LayerWeights(**weights, mlp_norm=norm)
        table = jnp.zeros((vocab, shape.hidden), dtype)
        params = StepParams(table, (layer,) * layers, (norm,) * (layers + 1), table.T)
        pools = (make_pool(key, shape, blocks),) * layers
        row = jnp.zeros((shape.tokens,), jnp.int32)
        return params, pools, row, row, jnp.zeros((shape.tokens, shape.entries), jnp.int32)

    args: tuple[Any, ...] = jax.eval_shape(make)
    if mesh is None:
        return args
    params, pools, *rest = args
    (axis,) = mesh.axis_names
    specs = (partition(params, axis), _pool_specs(pools, axis), *(P() for _ in rest))

    def place(leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    placed: tuple[Any, ...] = jax.tree.map(place, args, specs)
    return placed


def _pool_specs(pools: tuple[Pool, ...], axis: str) -> Any:
    """Pools are cut along K, the third dimension of all their arrays."""
    return jax.tree.map(lambda _: P(None, None, axis), pools)


def _most_likely(normed: jax.Array, head: jax.Array, axis_name: str | None) -> jax.Array:
    """The token with the highest logit, int32 [rows]; the lowest of equals."""
    logits = jnp.matmul(normed, head, preferred_element_type=jnp.float32)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if axis_name is None:
        return token
    best = logits.max(axis=-1)
    columns = jnp.int32(logits.shape[-1])
    mine = jnp.where(best == jax.lax.pmax(best, axis_name), token + jax.lax.axis_index(axis_name) * columns, 2**31 - 1)
    chosen: jax.Array = jax.lax.pmin(mine, axis_name)
    return chosen


@dataclass(frozen=True)
class CompiledStep:
    """A step compiled for GPUs that are not there; ``*_copies`` count instructions that make an array of that shape."""

    program: Program
    layers: int
    launches_per_layer: float
    pool_copies: int
    weight_copies: int


LLAMA_3_8B = {"layers": 32, "vocab": 128256, "blocks": 4096}


def compile_llama_8b(device: str, *, batch: int, tp: int = 1, **options: Any) -> CompiledStep:
    """Compile the decode step of a Llama-3-8B, 4-bit weights in groups of 128, over ``tp`` GPUs of kind ``device``.

    Launches per layer are the difference to a model with fewer layers. ``options`` are further fields of ``Shape``.
    """
    shape = model_shape("Llama-3-8B", batch, **options)
    layers, fewer = LLAMA_3_8B["layers"], 4
    program, (params, pools, *_) = _compile(device, shape, tp, LLAMA_3_8B)
    shallow, _ = _compile(device, shape, tp, {**LLAMA_3_8B, "layers": fewer})
    weights = {leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    return CompiledStep(
        program,
        layers,
        (program.on_device - shallow.on_device) / (layers - fewer),
        pool_copies=_made(program, set(jax.tree.leaves(pools))),
        weight_copies=_made(program, weights),
    )


def _compile(device: str, shape: Shape, tp: int, sizes: dict[str, int]) -> tuple[Program, tuple[Any, ...]]:
    if tp == 1:
        args = abstract_step_args(shape, **sizes, mesh=None)
        return compile_for(device, partial(decode_step, StepOptions(shape.head_dim)), *args, donate=(1,)), args
    mesh = offline_mesh(device, tp)
    args = abstract_step_args(shape, **sizes, mesh=mesh)
    step = sharded_decode_step(StepOptions(shape.head_dim), args[0], args[1], mesh)
    return compile_on_mesh(device, mesh, step, *args, donate=(1,)), args


def _made(program: Program, leaves: set[jax.ShapeDtypeStruct]) -> int:
    """Instructions of ``program`` whose result has the shape of one of ``leaves`` and is no alias of an operand."""
    names = {"bfloat16": "bf16", "float16": "f16", "int32": "s32", "uint8": "u8"}
    passing = "parameter|get-tuple-element|bitcast"
    count = 0
    for leaf in leaves:
        local = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        shape = f"{names[jnp.dtype(leaf.dtype).name]}[{','.join(map(str, local))}]"
        count += len(re.findall(rf"= {re.escape(shape)}\S* (?!(?:{passing})\()[\w-]+\(", program.hlo))
    return count
