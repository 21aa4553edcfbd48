"""Which implementation of an op runs: the first of the platform's order that does not refuse."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

OPS = ("paged_attention",)
"""Every op: a package with ``BACKENDS``, backend name → module that defines ``run`` and ``check``."""


class RefusalError(Exception):
    """A backend cannot do this call; the text says why."""


class NoBackendError(Exception):
    """Every backend refused; the text lists each one's reason."""


class BackendStatus(NamedTuple):
    """One line of ``backend_report``: whether a backend of an op works on this machine, and why not."""

    op: str
    backend: str
    usable: bool
    reason: str


def dispatch(op: str, backends: Mapping[str, str], names: Sequence[str], *args: Any, **kwargs: Any) -> jax.Array:
    """Run ``op`` on the first backend of ``names`` that accepts the call.

    Raises ``NoBackendError`` with every reason when all refuse.
    """
    reasons = []
    for name in names:
        run: Callable[..., jax.Array] = importlib.import_module(backends[name]).run
        try:
            return run(*args, **kwargs)
        except RefusalError as refusal:
            reasons.append(f"{name}: {refusal}")
    raise NoBackendError(f"{op}: no backend can do this call; " + "; ".join(reasons))


def backend_report() -> list[BackendStatus]:
    """Every op's backends and whether they are usable here (``jaxdeploy check_env`` prints it)."""
    report = []
    for op in OPS:
        backends: Mapping[str, str] = importlib.import_module(f"pallas_kernels.{op}").BACKENDS
        report += [_status(op, name, module) for name, module in backends.items()]
    return report


def _status(op: str, name: str, module: str) -> BackendStatus:
    try:
        importlib.import_module(module).check(jax.default_backend())
    except RefusalError as refusal:
        return BackendStatus(op, name, False, str(refusal))
    return BackendStatus(op, name, True, "")
