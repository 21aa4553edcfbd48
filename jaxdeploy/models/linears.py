"""Linear maps as a block declares them: weight tables, quantisation, LoRA and the fused decode step read this."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.models.layers import constant, parameter
from jaxdeploy.models.leaves import Axes

Array = np.ndarray[Any, Any]
Path = tuple[str, ...]
"""A parameter within its block: ``("attention", "wo")``."""


@dataclass(frozen=True)
class Outputs:
    """How the rows of stored [out, in] tensors, or the elements of [out] ones, become the output axes of a parameter.

    ``rows``: number of rows of each stored tensor.
    ``join``: takes arrays [rows, X], one per stored tensor, and returns [*outputs, X], or the same without X. X is the
    input width of a weight; quantised weights have other widths.
    ``cut``: the inverse of ``join``.
    ``axis``: output axis along which the stored tensors lie.
    ``shares``: number of indices of ``axis`` that each stored tensor has.
    """

    rows: tuple[int, ...]
    join: Callable[[Sequence[Array]], Array]
    cut: Callable[[Array], list[Array]]
    axis: int
    shares: tuple[int, ...]


def whole(*shape: int) -> Outputs:
    """Return the outputs of one tensor whose rows are in the order of the parameter's axes."""
    size = math.prod(shape)
    return Outputs(
        (size,),
        lambda arrays: arrays[0].reshape(*shape, *arrays[0].shape[1:]),
        lambda value: [value.reshape(size, *value.shape[len(shape) :])],
        axis=0,
        shares=shape[:1],
    )


@dataclass(frozen=True)
class NormInput:
    """The inputs of a linear map are the outputs of a norm.

    ``scale``: path of the norm's scale. Factors can be moved from the scale into the rows of the linear map.
    """

    scale: Path


@dataclass(frozen=True)
class LinearInput:
    """The inputs of a linear map are proportional to outputs of another one.

    Dividing those outputs by factors and multiplying the rows of the linear map by them changes nothing. The outputs
    are the ones with ``index`` on output axis ``axis`` of ``producer``; together they have the shape [X, *Y].

    ``producer``: path of the other linear map.
    ``shared``: number of inputs that one output feeds. The inputs have the shape [X, ``shared``, *Y].
    """

    producer: Path
    axis: int
    index: int
    shared: int = 1


@dataclass(frozen=True)
class LinearSpec:
    """A linear map [*inputs, *outputs] of a block.

    ``path``: path of its weight; the bias is in the same module.
    ``inputs``, ``outputs``: sizes of the input and output axes.
    ``axes``: logical axes of both, for tensor parallelism.
    ``parts``: names of the checkpoint's linear maps that it is made of, for a family to translate.
    ``fused``: how the parts become its output axes.
    ``joined``: how one tensor with all outputs becomes them; ``None`` keeps the order of its rows.
    ``bias``: attribute of its bias, or ``None`` if it has none.
    ``source``: where its inputs come from, if factors can be moved there.
    ``feeds_cache``: its outputs enter the cache, so every layer computes it for every token. The last layer computes
    other linear maps only for the tokens whose logits are sampled.
    """

    path: Path
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: Axes
    parts: tuple[str, ...]
    fused: Outputs
    bias: str | None = None
    source: NormInput | LinearInput | None = None
    joined: Outputs | None = None
    feeds_cache: bool = False

    @property
    def name(self) -> str:
        """Its name, which is unique within a block."""
        return self.path[-1]

    @property
    def width(self) -> int:
        """Number of inputs, all input axes together."""
        return math.prod(self.inputs)

    @property
    def input_axes(self) -> Axes:
        """Logical axes of the inputs."""
        return self.axes[: len(self.inputs)]

    @property
    def output_axes(self) -> Axes:
        """Logical axes of the outputs."""
        return self.axes[len(self.inputs) :]

    @property
    def bias_path(self) -> Path | None:
        """Path of its bias."""
        return None if self.bias is None else (*self.path[:-1], self.bias)

    def parameters(self, rngs: nnx.Rngs, dtype: jnp.dtype) -> tuple[nnx.Param[jax.Array], nnx.Param[jax.Array] | None]:
        """Return a random weight, and a bias of zeros if it has one."""
        weight = parameter(rngs, (*self.inputs, *self.outputs), self.axes, dtype)
        return weight, None if self.bias is None else constant(0.0, self.outputs, self.output_axes, dtype)


def weight_at(module: Any, path: Sequence[str | int]) -> Any:
    """Return the weight at ``path`` below ``module``."""
    for name in path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return module


def put_weight(module: Any, path: Sequence[str | int], weight: Any) -> None:
    """Put ``weight`` in place of the one at ``path`` below ``module``."""
    setattr(weight_at(module, path[:-1]), str(path[-1]), weight)


def within(module: str, specs: Iterable[LinearSpec], source: NormInput | None = None) -> tuple[LinearSpec, ...]:
    """Return the linear maps of a block's attribute ``module``, as the block declares them.

    ``source`` is where the inputs of the module come from; those fed from within the module have a source already.
    """
    placed = []
    for spec in specs:
        own = spec.source or source
        if isinstance(own, LinearInput):
            own = replace(own, producer=(module, *own.producer))
        placed.append(replace(spec, path=(module, *spec.path), source=own))
    return tuple(placed)
