"""The folder that a quantised model is written to, layer by layer, so that a run goes on where it was killed.

Everything goes to ``<folder>.partial`` first. A layer is done when its file is there, which appears whole or not at
all; the folder gets its name when the last file is in it, and until then has no ``config.json`` that could be loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import TensorFiles
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.errors import ConfigError

_RUN = "run.json"
_COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
_NOT_COPIED = ("config.json", "*.index.json", "quant_report.json")


class WorkDir:
    """The folder ``target``, to be filled with the weights of ``layers`` layers and the rest of the model.

    ``run`` is what the result depends on: a partial folder of another run is thrown away, one of the same continued.
    """

    def __init__(self, target: str | Path, *, layers: int, run: Mapping[str, Any], overwrite: bool) -> None:
        self.target = Path(target).expanduser()
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self._files, self._overwrite = layers + 1, overwrite
        if self.target.exists() and not overwrite and (not self.target.is_dir() or any(self.target.iterdir())):
            raise ConfigError(f"work_dir={target} exists and is not empty; name another, or add --overwrite")
        with self._disk():
            self._begin(hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest())

    def check_room(self, size: int) -> None:
        """Raise ``ConfigError`` where the disk has no room for ``size`` bytes, less what is there already."""
        missing = size - sum(file.stat().st_size for file in self.partial.iterdir())
        free = shutil.disk_usage(self.partial).free
        if free < missing:
            raise ConfigError(
                f"work_dir={self.target} has {free / 2**30:.1f} GiB of room, {missing / 2**30:.1f} are needed; "
                "make room, or name another folder"
            )

    def is_done(self, layer: int) -> bool:
        """Whether ``layer`` was written, now or by a run before."""
        return self._weights(layer).is_file()

    def write_layer(self, layer: int, tensors: Mapping[str, Array], record: Mapping[str, Any]) -> None:
        """Write a layer's tensors, and what there is to say about it. Raises ``ConfigError`` where that fails."""
        with self._disk():
            put_json(self._record(layer), record)
            put_tensors(self._weights(layer), tensors)

    def read_layer(self, layer: int) -> tuple[TensorFiles, dict[str, Any]]:
        """The tensors of a layer that is done, and its record."""
        record: dict[str, Any] = json.loads(self._record(layer).read_bytes())
        return TensorFiles(read_safetensors_file(self._weights(layer))), record

    def write_rest(self, source: Path, config: Mapping[str, Any], rest: Mapping[str, Array]) -> int:
        """Write the ``rest`` of the tensors and ``config.json``, and copy what else ``source`` has.

        Returns the bytes of all weights. Raises ``ConfigError`` where writing fails.
        """
        with self._disk():
            put_tensors(self._weights(self._files - 1), rest)
            files = [self._weights(number) for number in range(self._files)]
            places = {name: file.name for file in files for name in read_safetensors_file(file)}
            size = sum(file.stat().st_size for file in files)
            index = {"metadata": {"total_size": size}, "weight_map": places}
            put_json(self.partial / "model.safetensors.index.json", index)
            for file in _companions(source):
                shutil.copyfile(file, self.partial / file.name)
            put_json(self.partial / "config.json", config)
        return size

    def take_name(self) -> None:
        """The work is done: give the folder its name, and take away what only a run needs."""
        old = self.target.with_name(f"{self.target.name}.old")
        with self._disk():
            shutil.rmtree(old, ignore_errors=True)
            if self.target.exists():
                self.target.rename(old)
            self.partial.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
            for file in (_RUN, *(self._record(layer).name for layer in range(self._files - 1))):
                (self.target / file).unlink()

    def _begin(self, fingerprint: str) -> None:
        run = self.partial / _RUN
        if not run.is_file() or json.loads(run.read_bytes()) != fingerprint:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        for unfinished in self.partial.glob(".*.tmp"):
            unfinished.unlink()
        put_json(run, fingerprint)

    def _weights(self, number: int) -> Path:
        return self.partial / f"model-{number + 1:05d}-of-{self._files:05d}.safetensors"

    def _record(self, layer: int) -> Path:
        return self.partial / f"layer-{layer + 1:05d}.json"

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"work_dir={self.target} cannot be written ({error.strerror}); make room or name another folder: "
                f"what is done so far is kept in {self.partial.name} and will be used"
            ) from error


def _companions(source: Path) -> list[Path]:
    """Tokenizer, chat template and the like: the small files beside the weights."""
    found = {file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not any(file.match(pattern) for pattern in _NOT_COPIED))
