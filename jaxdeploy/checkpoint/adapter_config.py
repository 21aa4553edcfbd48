"""``adapter_config.json`` of PEFT: which options there are, and what scales each module's low-rank product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.fields import StoredFields, is_whole
from jaxdeploy.files.patterns import StoredPatterns
from jaxdeploy.files.stored import parse_json, read_bytes, shown

NAME = "adapter_config.json"
AGAIN = "save the adapter again with PEFT"

_LARGEST_RANK = 2**20
_LARGEST_ALPHA = 1e9
_REFUSED = {
    "use_dora": "DoRA scales whole weights; merge it with PEFT",
    "fan_in_fan_out": "linear maps here are stored [out, in]; train on nn.Linear",
    "lora_bias": "biases are not adapted; train without",
    "trainable_token_indices": "tokens are not adapted; train without",
    "target_parameters": "only linear modules are adapted; name them in target_modules",
    "layer_replication": "layers are not copied; train without",
    "use_qalora": "inputs are not pooled; train without",
    "alora_invocation_tokens": "an adapter applies to all tokens; train without",
    "arrow_config": "adapters are not routed by token; train without",
}
"""Options that change the maths, and what to do about them."""

_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of ``init_lora_weights`` whose adapters belong to a base that was changed by it."""


@dataclass(frozen=True)
class PatternTable:
    """Values by regular expression, each for the whole name of a module or for its end after a dot."""

    patterns: StoredPatterns
    values: tuple[Any, ...]

    def get(self, module: str, default: Any) -> Any:
        """The value of the first expression that matches. Raises ``CheckpointError``: matching takes too long."""
        index = self.patterns.first(module)
        return default if index is None else self.values[index]


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks and scalings of an adapter, by module.

    ``whole_modules`` are the names in ``modules_to_save``. ``faults`` are one-line texts about what cannot be served.
    """

    rank: int
    alpha: float
    ranks: PatternTable | None = None
    alphas: PatternTable | None = None
    rank_stabilized: bool = False
    whole_modules: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank that ``module`` should have. Raises ``CheckpointError``: matching takes too long."""
        return self.rank if self.ranks is None else int(self.ranks.get(module, self.rank))

    def scaling_of(self, module: str) -> float:
        """What the product of its two matrices is multiplied by: alpha / r, or alpha / √r (arXiv:2312.03732).

        Raises ``CheckpointError``: matching takes too long.
        """
        alpha = self.alpha if self.alphas is None else float(self.alphas.get(module, self.alpha))
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration in ``folder``; whatever is wrong with it is in its ``faults``."""
    try:
        found = parse_json(read_bytes(folder / NAME), f"{NAME}:")
    except FileNotFoundError:
        return _faulty(f"{NAME}: missing; {AGAIN}")
    except CheckpointError as error:
        return _faulty(str(error))
    if found.get("peft_type") != "LORA":
        return _faulty(f"{NAME}: peft_type={shown(found.get('peft_type'))} must be LORA; give a LoRA adapter")
    return _checked(found)


def _checked(found: Mapping[str, Any]) -> AdapterConfig:
    faults = [f"{NAME}: {name}={shown(found[name])}: {advice}" for name, advice in _REFUSED.items() if found.get(name)]
    if (bias := found.get("bias", "none")) != "none":
        faults.append(f"{NAME}: bias={shown(bias)} must be none; train without biases")
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_MOVES_THE_BASE):
        faults.append(f"{NAME}: init_lora_weights={shown(start)} changes the base; convert the adapter with PEFT first")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not _is_rank(rank):
        faults.append(f"{NAME}: r={shown(rank)} must be a whole number above 0; {AGAIN}")
    if not _is_number(alpha):
        faults.append(f"{NAME}: lora_alpha={shown(alpha)} must be a number; {AGAIN}")
    tables: dict[str, PatternTable | None] = {}
    for name, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        try:
            tables[name] = _pattern_table(found, name, is_valid)
        except CheckpointError as error:
            tables[name] = None
            faults.append(str(error))
    stored = StoredFields(found, NAME)
    try:
        stabilized, whole_modules = stored.flag("use_rslora", False), tuple(stored.texts("modules_to_save"))
    except CheckpointError as error:
        return _faulty(str(error))
    return AdapterConfig(
        int(rank) if _is_rank(rank) else 1,
        float(alpha) if _is_number(alpha) else 1.0,
        tables["rank_pattern"],
        tables["alpha_pattern"],
        stabilized,
        whole_modules,
        tuple(faults),
    )


def _pattern_table(found: Mapping[str, Any], name: str, is_valid: Callable[[Any], bool]) -> PatternTable | None:
    """The table in the field ``name``, ``None`` where it is empty. Raises ``CheckpointError``: it is none."""
    given = found.get(name) or {}
    if not isinstance(given, Mapping) or not all(map(is_valid, given.values())):
        raise CheckpointError(f"{NAME}: {name} must give a number for each regular expression of modules; {AGAIN}")
    if not given:
        return None
    patterns = StoredPatterns([rf"(?:.*\.)?(?:{key})$" for key in given], f"{NAME}: {name}")
    return PatternTable(patterns, tuple(given.values()))


def _faulty(fault: str) -> AdapterConfig:
    return AdapterConfig(1, 1.0, faults=(fault,))


def _is_rank(value: Any) -> TypeGuard[float]:
    return is_whole(value) and 0 < value < _LARGEST_RANK


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < _LARGEST_ALPHA
