"""From an adapter's folder to the content of a slot in the adapter bank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.checkpoint.adapter import AdapterWeights, Tensors, adaptable, base_tensors, read_adapter
from jaxdeploy.checkpoint.tensor_ref import TensorRef
from jaxdeploy.config import EngineConfig
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.lora import HEAD, AdapterBank, LowRank, bank_of
from jaxdeploy.models.registry import Family
from jaxdeploy.models.weights import Linear, ParamPath

logger = logging.getLogger("jaxdeploy")

DEFAULT_SLOTS = 8
ROUNDED = 16
"""The rank of a bank is a multiple of this size, which is that of a tensor-core tile."""


@dataclass(frozen=True)
class AdapterReader:
    """Reads adapters for a ``bank``; ``linears`` are the linear maps of the model, ``base`` its tensors."""

    linears: Mapping[ParamPath, Linear]
    bank: AdapterBank
    max_rank: int
    base: Mapping[str, TensorRef]

    def read(self, folder: str | Path) -> tuple[Any, ...]:
        """The content of a slot. Raises ``CheckpointError``: the adapter is damaged, or does not fit."""
        return self.content(read_adapter(folder, self.linears, max_rank=self.max_rank, base=self.base))

    def content(self, weights: AdapterWeights) -> tuple[Any, ...]:
        """The content of a slot. Raises ``CheckpointError``: the bank has no place for a module."""
        found = _pairs(weights, self.linears)
        for path in found:
            if not self.bank.fits(path):
                raise CheckpointError(
                    f"adapter={weights.folder} adapts {self.linears[path].modules[0]}, as none did that was given at "
                    "start; give one there that does, and this one can be loaded as well"
                )
        return self.bank.content(found)


@dataclass(frozen=True, eq=False)
class EngineAdapters:
    """How an engine reads adapters, the ``contents`` of those that it begins with, and the ``arrays`` of its bank."""

    reader: AdapterReader
    contents: Mapping[str, tuple[Any, ...]]
    arrays: tuple[jax.Array, ...]


def adapters_of(
    family: Family, model: ModelConfig, config: EngineConfig, mesh: Mesh, dtype: jnp.dtype, files: Callable[[], Tensors]
) -> EngineAdapters | None:
    """Return the adapters of ``config``, or ``None`` if it has none. ``files`` opens the model's tensors.

    Raises ``CheckpointError``: one of them is damaged, or does not fit; ``ConfigError``: a rank without adapters.
    """
    folders, slots, most = config.adapters or {}, config.max_loras, config.max_lora_rank
    if not folders and not slots:
        if most:
            raise ConfigError(f"max_lora_rank={most} needs room for adapters; give adapters, or max_loras=8")
        return None
    linears = adaptable(family, model)
    base = base_tensors(family, model, files())
    read = {name: read_adapter(folder, linears, max_rank=most, base=base) for name, folder in folders.items()}
    rank = most or max((weights.rank for weights in read.values()), default=1)
    rank = -(-rank // ROUNDED) * ROUNDED
    head = any(HEAD in _pairs(weights, linears) for weights in read.values())
    bank = bank_of(model, linears, mesh, slots=slots or DEFAULT_SLOTS, max_rank=rank, dtype=dtype, head=head)
    size = bank.device_bytes / 2**20
    logger.info("adapters: %d slots of rank up to %d, %.2f MiB on each device", bank.slots, rank, size)
    reader = AdapterReader(linears, bank, most or rank, base)
    contents = {name: reader.content(weights) for name, weights in read.items()}
    return EngineAdapters(reader, contents, bank.zeros())


def _pairs(weights: AdapterWeights, linears: Mapping[ParamPath, Linear]) -> dict[ParamPath, LowRank]:
    pairs = {path: weights.pair(linear) for path, linear in linears.items()}
    return {path: pair for path, pair in pairs.items() if pair is not None}
