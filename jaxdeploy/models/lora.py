"""LoRA adapters (arXiv:2106.09685) beside a decoder's weights, each token with one of its own or with none.

All adapters that the device holds are in a bank, one pair of arrays for each kind of linear map and all layers together
(few arguments for a step, as in S-LoRA, arXiv:2311.03285): the pair of layer ``l`` in slot ``s`` is entry
``l · slots + s``. Which slot a token uses is data, so one program serves any mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.layers import Weight, linear
from jaxdeploy.models.leaves import Axes
from jaxdeploy.models.linears import put_weight, weight_at
from jaxdeploy.models.model import Model
from jaxdeploy.models.weights import Linear, ParamPath, declared
from jaxdeploy.parallel.sharding import device_bytes, mesh_axis, product_per_device, replicated, sharding_of, spec
from pallas_kernels.lora_matmul import LoRAMatmulCall, lora_matmul

Array = np.ndarray[Any, Any]
Arrays = tuple[jax.Array, ...]
AnyModel = TypeVar("AnyModel", bound=Model)

HEAD = ("head", "weight")
"""The output projection, tied or not. It is no part of a layer."""


@dataclass(frozen=True)
class LowRank:
    """What is added to a linear map [*inputs, *outputs] of M modules: ``x``·``a``·``b``, with the scaling in ``b``.

    ``a`` float32 [K, M·R], module after module; ``b`` float32 [R, *outputs], each module's in its own outputs.
    """

    a: Array
    b: Array

    @property
    def rank(self) -> int:
        """R: the largest of a module."""
        return int(self.b.shape[0])


@dataclass(frozen=True)
class Kind:
    """Linear maps [*inputs, *outputs] that are alike in some layers.

    ``path``: path of the linear map within a layer.
    ``layers``: the layers that have it; the output projection has the one entry 0.
    ``inputs``, ``outputs``: sizes of the axes.
    ``input_axis``, ``output_axes``: logical axes.
    ``axis``: output axis along which the modules of the checkpoint lie.
    ``shares``: number of indices of ``axis`` that each module has.
    ``rank``: largest rank that a module may have.
    ``feeds_cache``: see ``LinearSpec``.
    """

    path: tuple[str, ...]
    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_axis: str | None
    output_axes: Axes
    axis: int
    shares: tuple[int, ...]
    rank: int
    feeds_cache: bool = False

    @property
    def count(self) -> int:
        """Number of layers that have it."""
        return len(self.layers)

    @property
    def modules(self) -> int:
        """M."""
        return len(self.shares)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one pair: [K, M·R] and [R, *outputs]."""
        return (math.prod(self.inputs), self.modules * self.rank), (self.rank, *self.outputs)

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The logical axes of a pair."""
        return (self.input_axis, None), (None, *self.output_axes)

    def product(self, x: jax.Array, a: jax.Array, b: jax.Array, *which: jax.Array) -> jax.Array:
        """``x`` [T, K] times entries of a bank, on a device's own share of it → [T, *outputs]."""
        behind = math.prod(b.shape[self.axis + 3 :])
        segments = tuple(share * behind for share in self.shares) if self.modules > 1 else None
        flat = b.reshape(*b.shape[:2], -1)
        return lora_matmul(LoRAMatmulCall(x, a, flat, *which, segments=segments)).reshape(-1, *b.shape[2:])


class AdaptedWeight(nnx.Module):
    """A weight of any type, and what the adapters of the tokens add to its product.

    ``a`` [B, K, M·R] and ``b`` [B, R, *outputs] are a bank, ``entries`` int32 [T] says for each token which of it is
    its own (negative: none), ``candidates`` int32 [S] which occur at all, ``ranks`` int32 [B] how many of R are in use.
    """

    def __init__(self, base: Weight, kind: Kind, mesh: Mesh, use: Mapping[str, jax.Array]) -> None:
        self.base, self.kind, self.mesh = base, kind, mesh
        self.a, self.b = nnx.Variable(use["a"]), nnx.Variable(use["b"])
        self.entries, self.candidates = nnx.Variable(use["entries"]), nnx.Variable(use["candidates"])
        self.ranks = nnx.Variable(use["ranks"])

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x`` [T, K] → [T, *outputs], dtype of ``x``."""
        use = (self.a[...], self.b[...], self.entries[...], self.candidates[...], self.ranks[...])
        return linear(x.reshape(-1, *self.kind.inputs), self.base) + _update(self.kind, self.mesh, x, *use)


@dataclass(frozen=True)
class AdapterBank:
    """What there is in a bank of ``slots`` adapters, floats of ``dtype``, cut over ``mesh`` as the weights are.

    Its arrays: a [count · slots, K, M·R] and b [count · slots, R, *outputs] of each of ``kinds``, and behind them the
    ranks in use, int32 [layers · slots, kinds].
    """

    kinds: tuple[Kind, ...]
    slots: int
    layers: int
    dtype: jnp.dtype
    mesh: Mesh

    @property
    def arrays(self) -> int:
        """How many there are."""
        return 2 * len(self.kinds) + 1

    @property
    def device_bytes(self) -> int:
        """Bytes of all arrays except the ranks, on one device."""
        return sum(
            device_bytes(sharding, shape, self.dtype)
            for kind in self.kinds
            for shape, sharding in zip(self._shapes(kind), self._shardings(kind), strict=True)
        )

    def zeros(self) -> Arrays:
        """The arrays of a bank without adapters, on their devices."""
        made = [
            jax.jit(lambda shape=shape: jnp.zeros(shape, self.dtype), out_shardings=sharding)()
            for kind in self.kinds
            for shape, sharding in zip(self._shapes(kind), self._shardings(kind), strict=True)
        ]
        ranks = np.zeros((self.layers * self.slots, len(self.kinds)), np.int32)
        return (*made, jax.device_put(ranks, replicated(self.mesh)))

    def fits(self, path: ParamPath) -> bool:
        """Whether there is a place for the pair of the linear map at ``path``."""
        return any(path == _path(kind, layer) for kind in self.kinds for layer in kind.layers)

    def content(self, pairs: Mapping[ParamPath, LowRank]) -> tuple[Array, ...]:
        """What a slot holds of an adapter, on the host: as the arrays, with its own entries alone."""
        parts: list[Array] = []
        ranks = np.zeros((self.layers, len(self.kinds)), np.int32)
        for row, kind in enumerate(self.kinds):
            a, b = (np.zeros((kind.count, *shape), self.dtype) for shape in kind.shapes)
            for index, layer in enumerate(kind.layers):
                pair = pairs.get(_path(kind, layer))
                if pair is not None:
                    places = a[index].reshape(len(a[index]), kind.modules, -1)
                    places[..., : pair.rank] = pair.a.reshape(len(pair.a), kind.modules, -1)
                    b[index, : pair.rank] = pair.b
                    ranks[index, row] = pair.rank
            parts += [a, b]
        return (*parts, ranks)

    def put(self, arrays: Arrays, slot: int, content: Sequence[Array]) -> Arrays:
        """Launch the copy of a ``content`` into a slot; the arrays come back, which were donated."""
        placed = jax.device_put(tuple(content), self._content_shardings)
        filled: Arrays = self._put(arrays, np.int32(slot), placed)
        return filled

    def adapted(
        self, decoder: AnyModel, arrays: Arrays, slots: jax.Array, selected: jax.Array | None = None
    ) -> AnyModel:
        """``decoder`` for tokens whose adapters are in ``slots``, int32 [T] (negative: none); inside a step.

        ``selected`` int32 [B] is that of ``Model.hidden``.
        """
        copy: Any = nnx.merge(*nnx.split(decoder))
        for index, layer in enumerate(copy.layers):
            last = selected is not None and index == self.layers - 1
            for row, kind in enumerate(self.kinds):
                if kind.path == HEAD or index not in kind.layers:
                    continue
                own = slots[selected] if last and not kind.feeds_cache else slots
                base: Weight = weight_at(layer, kind.path)
                use = self._use(arrays, row, kind.layers.index(index), own)
                put_weight(layer, kind.path, AdaptedWeight(base, kind, self.mesh, use))
        adapted: AnyModel = copy
        return adapted

    def logits(self, decoder: Model, arrays: Arrays, x: jax.Array, slots: jax.Array) -> jax.Array:
        """``x`` [T, D] → float32 [T, V], of tokens whose adapters are in ``slots``, int32 [T]."""
        logits = decoder.logits(x)
        for row, kind in enumerate(self.kinds):
            if kind.path == HEAD:
                update = _update(kind, self.mesh, x, *self._use(arrays, row, 0, slots).values())
                logits = logits + update.astype(jnp.float32)
        return logits

    def _use(self, arrays: Arrays, row: int, index: int, slots: jax.Array) -> dict[str, jax.Array]:
        """What ``_update`` takes beside ``x``, of the kind in ``row`` and its layer number ``index``."""
        count, first = self.kinds[row].count * self.slots, index * self.slots
        return {
            "a": arrays[2 * row],
            "b": arrays[2 * row + 1],
            "entries": jnp.where(slots < 0, -1, slots + first),
            "candidates": jnp.arange(first, first + self.slots, dtype=jnp.int32),
            "ranks": arrays[-1][:count, row],
        }

    def _shapes(self, kind: Kind) -> Iterator[tuple[int, ...]]:
        return ((kind.count * self.slots, *shape) for shape in kind.shapes)

    def _shardings(self, kind: Kind) -> Iterator[jax.sharding.NamedSharding]:
        pairs = zip(kind.axes, self._shapes(kind), strict=True)
        return (sharding_of(self.mesh, (None, *axes), shape) for axes, shape in pairs)

    @cached_property
    def _content_shardings(self) -> tuple[jax.sharding.NamedSharding, ...]:
        return (*(sharding for kind in self.kinds for sharding in self._shardings(kind)), replicated(self.mesh))

    @cached_property
    def _put(self) -> Any:
        def put(arrays: Arrays, slot: jax.Array, content: Arrays) -> Arrays:
            return tuple(self._filled(*pair, slot) for pair in zip(arrays, content, strict=True))

        return jax.jit(put, donate_argnums=0, out_shardings=self._content_shardings)

    def _filled(self, array: jax.Array, own: jax.Array, slot: jax.Array) -> jax.Array:
        """``array`` with the entries ``own`` of a slot in their places."""
        apart = array.reshape(-1, self.slots, *array.shape[1:])
        start = [jnp.int32(0)] * apart.ndim
        start[1] = slot
        return lax.dynamic_update_slice(apart, own[:, None], start).reshape(array.shape)


def bank_of(
    model: ModelConfig,
    linears: Mapping[ParamPath, Linear],
    mesh: Mesh,
    *,
    slots: int,
    max_rank: int,
    dtype: jnp.dtype,
    head: bool = False,
) -> AdapterBank:
    """The bank for adapters of modules of up to ``max_rank``, and for those of the head where that is asked for.

    ``linears`` are the linear maps of the model as an untied one has them.
    """
    kinds: dict[tuple[Any, ...], Kind] = {}
    for index, layer in enumerate(model.layers):
        for linear_spec in declared(layer, model.hidden_size):
            joined = linears["layers", index, *linear_spec.path].outputs
            alike = (linear_spec.path, linear_spec.inputs, linear_spec.outputs, joined.axis, joined.shares)
            before = kinds[alike].layers if alike in kinds else ()
            kinds[alike] = Kind(
                path=linear_spec.path,
                layers=(*before, index),
                inputs=linear_spec.inputs,
                outputs=linear_spec.outputs,
                input_axis=linear_spec.input_axes[0],
                output_axes=_even(mesh, linear_spec.output_axes, linear_spec.outputs),
                axis=joined.axis,
                shares=joined.shares,
                rank=max_rank,
                feeds_cache=linear_spec.feeds_cache,
            )
    if head:
        kinds[HEAD] = _head_kind(model, mesh, max_rank)
    return AdapterBank(tuple(kinds.values()), slots, model.num_layers, dtype, mesh)


def _head_kind(model: ModelConfig, mesh: Mesh, max_rank: int) -> Kind:
    outputs = (model.vocab_size,)
    return Kind(
        path=HEAD,
        layers=(0,),
        inputs=(model.hidden_size,),
        outputs=outputs,
        input_axis="embed",
        output_axes=_even(mesh, ("vocab",), outputs),
        axis=0,
        shares=outputs,
        rank=max_rank,
    )


def _even(mesh: Mesh, axes: Axes, sizes: Sequence[int]) -> Axes:
    """``axes``, but ``None`` where the devices cannot share the size evenly."""
    return tuple(axis if mesh_axis(mesh, axis, size) else None for axis, size in zip(axes, sizes, strict=True))


def _path(kind: Kind, index: int) -> ParamPath:
    return kind.path if kind.path == HEAD else ("layers", index, *kind.path)


def _update(kind: Kind, mesh: Mesh, x: jax.Array, *use: jax.Array) -> jax.Array:
    """What adapters add: ``x`` [T, K] → [T, *outputs]; each device has its share of inputs or of outputs.

    ``use`` holds ``a``, ``b``, ``entries``, ``candidates`` and ``ranks`` of ``AdaptedWeight``.
    """
    inputs, outputs = kind.input_axis, kind.output_axes
    ins = (spec(None, inputs), spec(None, inputs, None), spec(None, None, *outputs), spec(), spec(), spec())
    product = product_per_device(mesh, kind.product, inputs, ins, spec(None, *outputs))
    return product(x, *use)
