"""``adapter_config.json`` of PEFT: which options there are, and what scales each module's low-rank product."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

NAME = "adapter_config.json"
AGAIN = "save the adapter again with PEFT"

_REFUSED = {
    "use_dora": "DoRA scales whole weights; merge it with PEFT",
    "modules_to_save": "whole modules cannot differ between requests; train without",
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
class AdapterConfig:
    """Ranks and scalings of an adapter, by module; ``faults`` are one-line texts about what cannot be served.

    A pattern is a regular expression for the whole name of a module, or for its end behind a dot.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    rank_stabilized: bool = False
    faults: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank that ``module`` should have."""
        return next((rank for pattern, rank in self.ranks if pattern.fullmatch(module)), self.rank)

    def scaling_of(self, module: str) -> float:
        """What the product of its two matrices is multiplied by: alpha / r, or alpha / √r (arXiv:2312.03732)."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.fullmatch(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration in ``folder``; whatever is wrong with it is in its ``faults``."""
    try:
        found = json.loads((folder / NAME).read_bytes())
    except FileNotFoundError:
        return _faulty(f"{NAME}: missing; {AGAIN}")
    except OSError as error:
        return _faulty(f"{NAME}: cannot be read ({error.strerror}); mend that and try again")
    except (ValueError, RecursionError) as error:
        return _faulty(f"{NAME}: is not JSON ({error}); {AGAIN}")
    if not isinstance(found, dict):
        return _faulty(f"{NAME}: is not a JSON object; {AGAIN}")
    if found.get("peft_type") != "LORA":
        return _faulty(f"{NAME}: peft_type={found.get('peft_type')!r} must be LORA; give a LoRA adapter")
    return _checked(found)


def _checked(found: Mapping[str, Any]) -> AdapterConfig:
    faults = [f"{NAME}: {name}={found[name]!r:.60}: {advice}" for name, advice in _REFUSED.items() if found.get(name)]
    if (bias := found.get("bias", "none")) != "none":
        faults.append(f"{NAME}: bias={bias!r:.60} must be none; train without biases")
    if str(start := found.get("init_lora_weights")).startswith(_MOVES_THE_BASE):
        faults.append(f"{NAME}: init_lora_weights={start!r:.60} changes the base; convert the adapter with PEFT first")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not _is_rank(rank):
        faults.append(f"{NAME}: r={rank!r:.60} must be a whole number above 0; {AGAIN}")
    if not _is_number(alpha):
        faults.append(f"{NAME}: lora_alpha={alpha!r:.60} must be a number; {AGAIN}")
    patterns: dict[str, list[tuple[re.Pattern[str], Any]]] = {"rank_pattern": [], "alpha_pattern": []}
    for name, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        given = found.get(name) or {}
        try:
            items = [(re.compile(rf"(?:.*\.)?(?:{key})"), value) for key, value in given.items()]
        except (re.error, AttributeError, RecursionError):
            items = [(re.compile(""), None)]
        if not all(is_valid(value) for _, value in items):
            faults.append(f"{NAME}: {name} must give a number for each regular expression of modules; {AGAIN}")
            continue
        patterns[name] = items
    return AdapterConfig(
        rank if _is_rank(rank) else 1,
        float(alpha) if _is_number(alpha) else 1.0,
        tuple(patterns["rank_pattern"]),
        tuple(patterns["alpha_pattern"]),
        bool(found.get("use_rslora")),
        tuple(faults),
    )


def _faulty(fault: str) -> AdapterConfig:
    return AdapterConfig(1, 1.0, faults=(fault,))


def _is_rank(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)
