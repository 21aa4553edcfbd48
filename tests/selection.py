"""What of many parameters the fast suite takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every_other(items: Iterable[Any]) -> list[Any]:
    """Parameters of a test: ``items``, of which every second one is slow. Neighbours are alike."""
    return [pytest.param(item, marks=[pytest.mark.slow] * (place % 2)) for place, item in enumerate(items)]
