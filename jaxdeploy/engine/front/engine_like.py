"""What an engine is to those who use it: in the same process, in another, or a stand-in."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.messages import Request, StepOutput


class EngineLike(Protocol):
    """The part of ``Engine`` that does not depend on where it runs."""

    @property
    def limits(self) -> RequestLimits:
        """What it takes."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        ...

    @property
    def stats(self) -> EngineStats:
        """How it stands."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request, or raise."""
        ...

    def abort(self, request_id: str) -> None:
        """Drop a request; one that has ended, or never was, is no error.

        No later ``step`` returns an output of it. Its name may be used again at once.
        """
        ...

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        """Have a LoRA adapter read; once that is done requests may ask for it. What is wrong stands in the future."""
        ...

    def unload_adapter(self, name: str) -> Future[None]:
        """Refuse requests for an adapter; those that are there go on. What is wrong stands in the future."""
        ...

    def step(self) -> list[StepOutput]:
        """What has come since the last call."""
        ...

    def wake(self) -> None:
        """Have a ``step`` that waits for something to come return; any thread may call it."""
        ...

    def close(self) -> None:
        """Give the device memory back."""
        ...
