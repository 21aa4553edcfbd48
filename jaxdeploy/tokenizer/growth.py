"""Limits how much longer a ``tokenizer.json`` may make a text.

A normalizer or decoder with forty steps that each double a letter would need a terabyte for one letter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError

MAX_FACTOR = 1000
"""Bytes for each byte of a text. Known tokenizers make spaces three times as long."""

_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def check_growth(description: Mapping[str, Any], path: Path) -> None:
    """Raise ``CheckpointError`` if a part of ``description`` may make a text more than ``MAX_FACTOR`` times as long."""
    for name, members in _PARTS.items():
        factor = 1.0
        for step in _steps(description.get(name), members):
            factor *= max(_factor(step), 1.0)
            if factor > MAX_FACTOR:
                raise CheckpointError(
                    f"{path}: its {name} makes texts more than {MAX_FACTOR} times as long; correct it"
                )


def _steps(part: Any, members: str) -> Iterator[Mapping[str, Any]]:
    """Return the steps of a part in their order; sequences may be nested."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, Mapping):
            continue
        inner = step.get(members)
        if isinstance(inner, list):
            waiting += reversed(inner)
        yield step


def _factor(step: Mapping[str, Any]) -> float:
    """Return the largest number of bytes that a step puts in place of one."""
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") == "Prepend":
        content, pattern = step.get("prepend"), None
    if not isinstance(content, str):
        return 1.0
    replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
    if not isinstance(replaced, str):
        return float(len(content.encode()))
    return len(content.encode()) / len(replaced.encode()) if replaced else math.inf
