"""Loading and unloading of LoRA adapters while an engine runs."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdeploy.engine.device.adapter_reader import AdapterReader
from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.errors import ConfigError, UnknownAdapterError


class AdapterLoader:
    """Reads adapters in a thread. Only the engine's thread changes the ``Adapters``."""

    def __init__(self, adapters: Adapters, reader: AdapterReader | None) -> None:
        """``reader`` is ``None`` if the engine has no slots for adapters."""
        self._adapters = adapters
        self._reader = reader
        self._loaded: deque[tuple[str, Any]] = deque()
        """Name and content of adapters that the thread has read and the engine's thread has not taken yet."""
        self._thread = ThreadPoolExecutor(1, "jaxdeploy-loader")

    @property
    def has_slots(self) -> bool:
        """Whether sequences may have adapters."""
        return self._reader is not None

    @property
    def adapters(self) -> Adapters:
        """The adapters, with those that were read since the last access."""
        while self._loaded:
            self._adapters.load(*self._loaded.popleft())
        return self._adapters

    def load(self, name: str, folder: str | Path) -> Future[None]:
        """Read an adapter in PEFT's layout. Requests may name it once the future is done.

        Raises, in the future:
            CheckpointError: the adapter is damaged or does not fit.
            ConfigError: there is no room for adapters.
        """

        def read() -> None:
            if self._reader is None:
                raise ConfigError(f"adapter={name!r} cannot be loaded: there is no room; start with max_loras=8")
            self._loaded.append((name, self._reader.read(folder)))

        return self._thread.submit(read)

    def unload(self, name: str) -> Future[None]:
        """Refuse new requests for an adapter. Raises ``UnknownAdapterError`` in the future."""
        return unload(self.adapters, name)

    def close(self) -> None:
        """Drop what has not been read yet."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def unload(adapters: Adapters, name: str) -> Future[None]:
    """Unload an adapter, and return a future that is done. It raises ``UnknownAdapterError``."""
    answer: Future[None] = Future()
    try:
        adapters.unload(name)
    except UnknownAdapterError as error:
        answer.set_exception(error)
    else:
        answer.set_result(None)
    return answer
