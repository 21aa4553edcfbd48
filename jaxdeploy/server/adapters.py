"""The LoRA adapters beside a served model, by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jaxdeploy.engine.front.async_engine import AsyncEngine
from jaxdeploy.engine.front.process import EngineDiedError
from jaxdeploy.errors import CheckpointError, RequestError

logger = logging.getLogger("jaxdeploy.server")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter of the server's disk, and since when it is served."""

    folder: str
    created: int = field(default_factory=lambda: int(time.time()))


class ServedAdapters(Mapping[str, ServedAdapter]):
    """Those of ``engine`` that requests may name in place of ``model``. For one event loop.

    ``folders`` are those that it began with.
    """

    def __init__(self, engine: AsyncEngine, model: str, folders: Mapping[str, str]) -> None:
        self._engine = engine
        self._model = model
        self._served = {name: ServedAdapter(folder) for name, folder in folders.items()}
        self._loading: set[str] = set()

    def __getitem__(self, name: str) -> ServedAdapter:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    async def load(self, name: str, folder: str, *, in_place: bool = False) -> None:
        """Serve one more; ``in_place`` it may be another one of a name that is served.

        Raises:
            RequestError: the name is taken, or the adapter is damaged or does not fit; all faults are listed.
            ConfigError: the engine has no room for adapters.
        """
        self._check_quiet(name)
        if name == self._model:
            raise RequestError(f"lora_name={name!r:.80} is the name of the model; choose another")
        if name in self._served and not in_place:
            raise RequestError(
                f"lora_name={name!r:.80} is loaded already; unload it first, or send load_inplace=true to replace it"
            )
        self._loading.add(name)
        try:
            await self._engine.load_adapter(name, folder)
        except CheckpointError as error:
            raise RequestError(f"lora_name={name!r:.80}: {error}") from None
        except OSError as error:
            raise RequestError(f"lora_path={folder!r:.200} cannot be read ({error.strerror}); give another") from None
        finally:
            self._loading.discard(name)
        self._served[name] = ServedAdapter(folder)
        logger.info("adapter %r is loaded from %r", name, folder)

    async def unload(self, name: str) -> None:
        """Serve it no longer; replies that run with it go on to their end.

        Raises ``UnknownAdapterError``, or ``EngineDiedError``: the adapter is still served after the restart.
        """
        self._check_quiet(name)
        served = self._served.pop(name, None)
        try:
            await self._engine.unload_adapter(name)
        except EngineDiedError:
            if served is not None:
                self._served.setdefault(name, served)
            raise
        logger.info("adapter %r is unloaded", name)

    def _check_quiet(self, name: str) -> None:
        if name in self._loading:
            raise RequestError(f"lora_name={name!r:.80} is being loaded; wait until that is done")
