"""Fields and lists of choices that several settings use."""

from __future__ import annotations

from typing import Any

from jaxdeploy.settings import Rule, setting

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "WARN", "ERROR", "CRITICAL", "FATAL", "NOTSET")
FLOAT_TYPES = ("auto", "float32", "bfloat16", "float16")


def positive(help: str, default: int | None, advice: str, *, minimum: int = 1, flag: bool = True) -> Any:
    """A field for a whole number of at least ``minimum`` and below 2^31."""
    return setting(
        default,
        help,
        rule=Rule(f"must be at least {minimum} and below 2^31", lambda value: minimum <= value < 2**31),
        advice=advice,
        flag=flag,
    )


def seconds(default: float, help: str) -> Any:
    """A field for a time in seconds, more than 0."""
    return setting(default, help, rule=Rule("must be more than 0", lambda value: value > 0), advice="give seconds")
