"""What of many parameters the fast suite takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

COMPLETE_BACKENDS = ("pallas_triton", "xla", "reference")
"""Kernel backends that must take every call of their op's tests. Others may refuse calls: those tests are skipped."""


def complete(backends: Iterable[str]) -> list[str]:
    """Return the names among ``backends`` that may not refuse a call."""
    return [name for name in backends if name in COMPLETE_BACKENDS]


def every_other(items: Iterable[Any]) -> list[Any]:
    """Parameters of a test: ``items``, of which every second one is slow. Neighbours are alike."""
    return [pytest.param(item, marks=[pytest.mark.slow] * (place % 2)) for place, item in enumerate(items)]
