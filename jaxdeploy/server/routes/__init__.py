"""Routes, one module for each API. A new one is a module here with a ``router``, and its name in ``ROUTERS``."""

from __future__ import annotations

from importlib import import_module

from fastapi import APIRouter

ROUTERS = (
    *("models", "chat", "responses", "completions", "embeddings", "anthropic", "lmdeploy"),
    *("tokens", "health", "requests", "adapters"),
)


def routers() -> list[APIRouter]:
    """All of them."""
    return [import_module(f"{__name__}.{name}").router for name in ROUTERS]
