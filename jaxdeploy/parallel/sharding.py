"""Where an array lives: its logical axes, looked up in one table of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxdeploy.errors import ConfigError
from jaxdeploy.parallel.mesh import TP_AXIS, axis_size

Axes = Sequence[str | None]
"""One logical axis for each dimension; ``None`` has no name and stays whole."""

RULES: dict[str, str | None] = {
    "heads": TP_AXIS,
    "kv_heads": TP_AXIS,
    "mlp": TP_AXIS,
    "vocab": TP_AXIS,
    "embed": None,
    "table": None,
}
"""Logical axis → mesh axis; ``None`` keeps the axis whole on every device."""

NOUNS = {"heads": "query heads", "kv_heads": "KV heads", "mlp": "intermediate features"}
"""Logical axis → its elements, for messages."""


def sharding_of(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """The placement of an array with these logical ``axes``; an axis that does not divide evenly stays whole."""
    mapped = (mesh_axis(mesh, axis, size) for axis, size in zip(axes, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*mapped))


def mesh_axis(mesh: Mesh, axis: str | None, size: int) -> str | None:
    """Return the mesh axis that cuts ``size`` elements of the logical ``axis``; ``None`` if they stay whole."""
    name = None if axis is None else RULES[axis]
    return name if name in mesh.shape and size % axis_size(mesh, name) == 0 else None


def device_bytes(sharding: Sharding, shape: Sequence[int], dtype: jnp.dtype) -> int:
    """Return the bytes that one device holds of an array with this placement."""
    return math.prod(sharding.shard_shape(tuple(shape))) * dtype.itemsize


def spec(*axes: str | None) -> PartitionSpec:
    """Logical axes as mesh axes; those at the end may be left out."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def per_device(mesh: Mesh, function: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
    """``function`` on each device's own part of its arguments: kernels cannot be cut up by the compiler.

    ``ins`` and ``outs`` give a ``spec`` for every argument and result, or one for a whole tree.
    """
    if mesh.devices.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)


def product_per_device(
    mesh: Mesh, product: Callable[..., jax.Array], inputs: str | None, ins: Any, outs: Any
) -> Callable[..., jax.Array]:
    """``product`` on each device's share, summed over the devices where the logical axis ``inputs`` is cut."""
    axis = None if inputs is None else RULES[inputs]
    if axis is None or axis_size(mesh, axis) == 1:
        return per_device(mesh, product, ins, outs)
    return per_device(mesh, lambda *args: jax.lax.psum(product(*args), axis), ins, outs)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(tp: int, sizes: Mapping[str, Collection[int]]) -> None:
    """Raise ``ConfigError`` unless ``tp`` divides each of ``sizes``, which are those of a logical axis."""
    every = math.gcd(*(size for values in sizes.values() for size in values))
    for axis, values in sizes.items():
        for size in sorted(values):
            if size % tp:
                raise ConfigError(
                    f"tp={tp} must divide {size} {NOUNS.get(axis, axis)} ({size} = {size // tp} x {tp} + {size % tp}); "
                    f"use tp={_either(n for n in range(1, every + 1) if every % n == 0)}"
                )


def _either(numbers: Iterable[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
