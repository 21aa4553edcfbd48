"""Which implementation of an op runs: the first of its ``BACKENDS`` that does not refuse, or the one that is named.

A call is a value that knows its op (``Call``). A backend is a module that runs the calls of an op (``Backend``).
Without a GPU, a Pallas backend that is named is interpreted: slow, with the same numbers.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, cast

from pallas_kernels.target import Target, current_target

OPS = ("decode_layer", "kv_cache_write", "lora_matmul", "paged_attention", "rms_norm", "w4a16_matmul", "w8a8_matmul")
"""Every op: a package with ``BACKENDS``, backend name → module, in order of preference."""

ENVIRONMENT = "PALLAS_KERNELS"
"""Names the backend to use where no argument does: ``NAME`` for every op that has it, or ``op=NAME,op=NAME``."""


class RefusalError(Exception):
    """A backend cannot do this call; the text says why."""


class NoBackendError(Exception):
    """Every backend refused; the text lists each one's reason."""


class BackendNameError(ValueError):
    """An argument or the environment names a backend, or an op, that does not exist."""


class BackendStatus(NamedTuple):
    """One line of ``backend_report``: whether a backend of an op works on this machine, and why not."""

    op: str
    backend: str
    usable: bool
    reason: str


class Call(Protocol):
    """The operands and options of one call of an op: a frozen dataclass that is a pytree."""

    OP: ClassVar[str]
    """The op's name in ``OPS``."""

    def validate(self) -> None:
        """Raise ``ValueError`` for operands that do not fit together."""
        ...


class Backend(Protocol):
    """What the module of a backend defines. ``call`` is the op's own class."""

    def check_device(self, target: Target) -> None:
        """Raise ``RefusalError`` if the backend does not run on ``target``."""
        ...

    def check(self, call: Any) -> None:
        """Raise ``RefusalError`` if the backend cannot do a valid ``call``."""
        ...

    def run(self, call: Any, tiles: Any) -> Any:
        """Return the op's result. Raises ``RefusalError`` for ``tiles`` of another backend; ``None`` chooses them."""
        ...


def dispatch(call: Call, *, backend: str | None = None, tiles: Any = None) -> Any:
    """Run ``call`` on ``backend``, else on the backend that the environment names, else on the first that accepts.

    Raises:
        ValueError: operands that do not fit together.
        BackendNameError: a name that the op does not have.
        NoBackendError: every backend refused; the message has all the reasons.
    """
    call.validate()
    target, backends = current_target(), _backends(call.OP)
    named = backend or _from_environment(call.OP, backends)
    if named is not None and named not in backends:
        raise BackendNameError(f"backend={named} is none of {call.OP}'s; choose from {', '.join(backends)}")
    reasons = []
    for name in backends if named is None else [named]:
        module = cast(Backend, importlib.import_module(backends[name]))
        try:
            if named is None or not target.interpret:
                module.check_device(target)
            module.check(call)
            return module.run(call, tiles)
        except RefusalError as refusal:
            reasons.append(f"{name} {refusal}")
    raise NoBackendError(f"{call.OP}: {'; '.join(reasons)}")


def preferred(op: str) -> str | None:
    """The backend that ``dispatch`` tries first here: the one that the environment names, else the device's first."""
    target, backends = current_target(), _backends(op)
    if named := _from_environment(op, backends):
        return named
    return next((name for name, module in backends.items() if not _refusal(module, target)), None)


def need_gpu(target: Target, lowest: tuple[int, int] = (8, 0), highest: tuple[int, int] = (99, 0)) -> None:
    """Raise ``RefusalError`` unless ``target`` is a GPU whose compute capability lies in the range."""
    if target.capability is None:
        raise RefusalError(f"needs a GPU, have {target.platform} (where it is named, it is interpreted)")
    if not lowest <= target.capability <= highest:
        bounds = f"sm_{lowest[0]}{lowest[1]}" + (" or newer" if highest[0] == 99 else "")
        raise RefusalError(f"needs {bounds}, have {target}")


def backend_report() -> list[BackendStatus]:
    """Every op's backends and whether they are usable here (``jaxdeploy check_env`` prints it)."""
    target = current_target()
    report = []
    for op in OPS:
        for name, module in _backends(op).items():
            reason = _refusal(module, target)
            report.append(BackendStatus(op, name, not reason, reason))
    return report


def _backends(op: str) -> Mapping[str, str]:
    backends: Mapping[str, str] = importlib.import_module(f"pallas_kernels.{op}").BACKENDS
    return backends


def _refusal(module: str, target: Target) -> str:
    """Why a backend does not work on ``target``; empty where it does."""
    try:
        importlib.import_module(module).check_device(target)
    except RefusalError as refusal:
        return str(refusal)
    return ""


def _from_environment(op: str, backends: Mapping[str, str]) -> str | None:
    """The backend that ``PALLAS_KERNELS`` names for ``op``; a bare name counts for the ops that have it."""
    for entry in filter(None, os.environ.get(ENVIRONMENT, "").split(",")):
        where, _, name = entry.strip().rpartition("=")
        if where == op or (not where and name in backends):
            return name
        if where and where not in OPS:
            raise BackendNameError(f"{ENVIRONMENT}={entry} names no op; choose from {', '.join(OPS)}")
    return None
