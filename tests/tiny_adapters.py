"""Random LoRA adapters as PEFT stores them, and what they make of a module's weight, written here in numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxdeploy.checkpoint.adapter import adaptable
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.families import llama
from jaxdeploy.models.registry import Family
from tests.tiny_models import CONFIG

Array = np.ndarray[Any, Any]

QKV = ("q_proj", "k_proj", "v_proj")
ALL = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
LINEARS = adaptable(cast(Family, llama), CONFIG)


def module_sizes(config: ModelConfig = CONFIG) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every module of a Llama."""
    linears = adaptable(cast(Family, llama), config).values()
    return {
        name: (rows, linear.width)
        for linear in linears
        for name, rows in zip(linear.modules, linear.outputs.rows, strict=True)
    }


@dataclass(frozen=True)
class TinyAdapter:
    """An adapter of rank ``rank``, or of those in ``ranks`` by the last part of a module's name."""

    seed: int = 0
    targets: Sequence[str] = ALL
    rank: int = 4
    ranks: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 8
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    layers: Sequence[int] | None = None
    base: ModelConfig = CONFIG
    dtype: Any = np.float32

    @property
    def config(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
            "use_rslora": self.rslora,
            "target_modules": list(self.targets),
            "bias": "none",
        }

    def modules(self) -> dict[str, tuple[int, int]]:
        """Those that are adapted, with outputs and inputs."""
        return {name: size for name, size in module_sizes(self.base).items() if self._adapts(name)}

    def tensors(self) -> dict[str, Array]:
        """A and B of every module by their names in the file."""
        random, made = np.random.default_rng(self.seed), {}
        for name, (rows, width) in self.modules().items():
            rank = self.ranks.get(_last(name), self.rank)
            a = random.standard_normal((rank, width)) / math.sqrt(width)
            b = random.standard_normal((rows, rank)) / (self._scaling(name) * math.sqrt(rank))
            made[f"base_model.model.{name}.lora_A.weight"] = a.astype(self.dtype)
            made[f"base_model.model.{name}.lora_B.weight"] = b.astype(self.dtype)
        return made

    def delta(self, module: str) -> Array:
        """What is added to a module's weight, float64 [out, in]; zeros where it is not adapted."""
        if not self._adapts(module):
            return np.zeros(module_sizes(self.base)[module])
        tensors = self.tensors()
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        return self._scaling(module) * (b @ a)

    def write(self, folder: Path, *, config: Mapping[str, Any] | None = None) -> Path:
        """Into ``folder``, which comes back; ``config`` is laid over its own."""
        folder.mkdir(parents=True, exist_ok=True)
        put_json(folder / "adapter_config.json", {**self.config, **(config or {})})
        put_tensors(folder / "adapter_model.safetensors", self.tensors())
        return folder

    def _adapts(self, module: str) -> bool:
        numbers = [int(part) for part in module.split(".") if part.isdigit()]
        there = self.layers is None or not numbers or numbers[0] in self.layers
        return _last(module) in self.targets and there

    def _scaling(self, module: str) -> float:
        rank = self.ranks.get(_last(module), self.rank)
        return self.alphas.get(_last(module), self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
