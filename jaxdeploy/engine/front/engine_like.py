"""The interface of an engine, whether it runs in this process or in another."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.messages import Request, StepOutput


class EngineLike(Protocol):
    """The methods of ``Engine`` that are available from any process."""

    @property
    def limits(self) -> RequestLimits:
        """Limits that requests are checked against."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Current state and counters."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request, or raise."""
        ...

    def abort(self, request_id: str) -> None:
        """Drop a request. It is no error if the request has ended or never existed.

        No later ``step`` returns an output of it. Its name may be used again at once.
        """
        ...

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """Read a LoRA adapter. Requests may name it once the future is done; errors are raised in the future."""
        ...

    def unload_adapter(self, name: str) -> Future[None]:
        """Refuse new requests for an adapter. Current ones continue; errors are raised in the future."""
        ...

    def step(self) -> list[StepOutput]:
        """Return the outputs since the last call."""
        ...

    def wake(self) -> None:
        """Make a ``step`` that waits return. Any thread may call this."""
        ...

    def close(self) -> None:
        """Give the device memory back."""
        ...
