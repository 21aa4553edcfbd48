"""The float model that is quantised, read a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdeploy.checkpoint.loader import check_tensors, dummy_params, load_param
from jaxdeploy.checkpoint.tensors import TensorFiles, open_checkpoint
from jaxdeploy.compress.forward import LayerParams
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import abstract_params
from jaxdeploy.models.layers import Embedding, Head, RMSNorm
from jaxdeploy.models.linears import LinearSpec
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import ParamPath, Source, WeightTable, declared

_FLOAT = jnp.dtype(jnp.float32)


@dataclass(frozen=True)
class FloatModel:
    """A checkpoint folder, its ``config.json`` and weight table. ``files`` is ``None`` for random weights."""

    folder: Path
    hf: Mapping[str, Any]
    config: ModelConfig
    table: WeightTable
    files: TensorFiles | None

    @classmethod
    def open(cls, folder: Path, hf: Mapping[str, Any], load_format: str) -> FloatModel:
        """Check that the files hold what the configuration says. Raises ``CheckpointError``."""
        family = family_of(hf)
        config = family.model_config(hf)
        table = family.weights(config)
        if load_format == "dummy":
            return cls(folder, hf, config, table, None)
        files = open_checkpoint(folder)
        check_tensors(table, files)
        return cls(folder, hf, config, table, files)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the checkpoint's weights are stored in."""
        if self.files is None:
            return jnp.dtype(self.config.dtype)
        return self.files[self.table["embedding", "table"].names[0]].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        shapes = (param.get_value().shape for param in self._abstract.values())
        return sum(int(np.prod(shape)) for shape in shapes) * self.dtype.itemsize

    def sources(self, index: int) -> dict[tuple[str, ...], Source]:
        """The weight table of one layer, by path within it."""
        return {within(path): source for path, source in self.table.items() if path[:2] == ("layers", index)}

    def linears(self, index: int) -> tuple[LinearSpec, ...]:
        """The linear maps of one layer, as its block declares them."""
        return declared(self.config.layers[index], self.config.hidden_size)

    def layer(self, index: int) -> LayerParams:
        """A layer's parameters, float32."""
        return {path: self._own(("layers", index, *path)) for path in self.sources(index)}

    def outer_sources(self) -> dict[ParamPath, Source]:
        """The weight table of what is no layer: embedding, last norm, head."""
        return {path: source for path, source in self.table.items() if path[0] != "layers"}

    def outer(self) -> dict[ParamPath, jax.Array]:
        """Embedding, last norm and head, float32."""
        return {path: self._own(path) for path in self.outer_sources()}

    def read(self, path: ParamPath, source: Source, files: TensorFiles) -> jax.Array:
        """The parameter at ``path``, float32, from another source of it."""
        return load_param(path, self._abstract[path], source, files, dtype=_FLOAT)

    def _own(self, path: ParamPath) -> jax.Array:
        if self.files is None:
            return dummy_params({path: self._abstract[path]}, dtype=_FLOAT)[path]
        return self.read(path, self.table[path], self.files)

    @cached_property
    def _abstract(self) -> dict[ParamPath, nnx.Param[Any]]:
        return abstract_params(self.config, _FLOAT)


@dataclass(frozen=True)
class Outer:
    """The model around its layers."""

    embed: Embedding
    norm: RMSNorm
    head: Embedding | Head

    @classmethod
    def of(cls, config: ModelConfig, params: Mapping[ParamPath, jax.Array]) -> Outer:
        """The modules that hold ``params``."""
        sizes = (config.vocab_size, config.hidden_size)
        embed = nnx.eval_shape(lambda: Embedding(*sizes, rngs=nnx.Rngs(0), dtype=_FLOAT))
        embed.table = nnx.Param(params["embedding", "table"])
        norm = nnx.eval_shape(lambda: RMSNorm(config.hidden_size, config.norm_eps, dtype=_FLOAT))
        norm.scale = nnx.Param(params["norm", "scale"])
        if config.tie_embeddings:
            return cls(embed, norm, embed)
        head = nnx.eval_shape(lambda: Head(*sizes, rngs=nnx.Rngs(0), dtype=_FLOAT))
        head.weight = nnx.Param(params["head", "weight"])
        return cls(embed, norm, head)


def within(path: ParamPath) -> tuple[str, ...]:
    """The path of a layer's parameter within its layer."""
    return tuple(str(name) for name in path[2:])
