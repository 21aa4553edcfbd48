"""The folder that a result is written to, layer by layer, so that a killed run can be resumed.

Everything goes to ``<folder>.partial`` first. A layer is done when its file and its record exist; both appear whole or
not at all. The folder gets its name when its last file is written. Only files that a marker lists are replaced
(``checkpoint/marker.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxdeploy.checkpoint.marker import NAME, Marker, foreign_files, read_marker, remove_files, remove_ours
from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import TensorFiles
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.compress.folder_lock import lock, unlock
from jaxdeploy.compress.folder_swap import swap
from jaxdeploy.compress.texts import OWN_TEXT
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.atomic import put_file

INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", OWN_TEXT)
_NOT_COPIED = ("config.json", "*.index.json", "quant_report.json", NAME)


class WorkDir:
    """The folder ``target``, to be filled with a checkpoint made from the one in ``source``.

    Args:
        target: The folder. It may be missing, empty, or hold an earlier result if ``overwrite`` is true.
        source: The folder of the model; ``target`` may not be this folder.
        layers: The number of layers to write.
        command: The command that writes, for the marker.
        run: What the result depends on. A partial folder of the same run is continued, of another run replaced.
        extra: Names of further files that the command writes into ``partial``.
        overwrite: Replace an earlier result of jaxdeploy.

    Raises ``ConfigError``: the folder may not be written.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        source: Path,
        layers: int,
        command: str,
        run: Mapping[str, Any],
        extra: Iterable[str] = (),
        overwrite: bool,
    ) -> None:
        self.target = real_path(target)
        self.partial = Path(f"{self.target}.partial")
        self._source, self._files, self._command = source, layers + 1, command
        self._overwrite = overwrite
        with self.disk():
            check_target(self.target, source, overwrite=overwrite)
            planned = {*self._weight_names(), *self._record_names(), INDEX, "config.json", *extra}
            planned |= {file.name for file in _companions(source)}
            fingerprint = hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()
            self._begin(Marker(command, frozenset(planned), fingerprint))

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
        """Return whether ``layer`` was written, by this run or by an interrupted run."""
        return self._weights(layer).is_file() and self._record(layer).is_file()

    def write_layer(self, layer: int, tensors: Mapping[str, Array], record: Mapping[str, Any]) -> None:
        """Write a layer's tensors, and what there is to say about it. Raises ``ConfigError`` if writing fails."""
        with self.disk():
            put_json(self._record(layer), record)
            put_tensors(self._weights(layer), tensors)

    def read_layer(self, layer: int) -> tuple[TensorFiles, dict[str, Any]]:
        """The tensors of a layer that is done, and its record."""
        record: dict[str, Any] = json.loads(self._record(layer).read_bytes())
        return TensorFiles(read_safetensors_file(self._weights(layer))), record

    def write_rest(self, config: Mapping[str, Any], rest: Mapping[str, Array]) -> int:
        """Write the ``rest`` of the tensors and ``config.json``, and copy the small files of the source.

        Returns the bytes of all weights. Raises ``ConfigError`` if writing fails.
        """
        with self.disk():
            put_tensors(self._weights(self._files - 1), rest)
            files = [self._weights(number) for number in range(self._files)]
            places = {name: file.name for file in files for name in read_safetensors_file(file)}
            size = sum(file.stat().st_size for file in files)
            put_json(self.partial / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
            for file in _companions(self._source):
                _copy(file, self.partial / file.name)
            put_json(self.partial / "config.json", config)
        return size

    def take_name(self) -> None:
        """Give the finished folder its name and delete the earlier result. Raises ``ConfigError``.

        The name changes hands in one step where the system can do that. A crash leaves both folders on the disk.
        """
        with self.disk():
            check_target(self.target, self._source, overwrite=self._overwrite)  # others may have written meanwhile
            old = swap(self.partial, self.target)
            if old is not None:
                remove_ours(old)
            for name in self._record_names():
                (self.target / name).unlink(missing_ok=True)
            planned = read_marker(self.target).files
            written = frozenset(name for name in planned if (self.target / name).exists())
            Marker(self._command, written).write(self.target)
            unlock(self.partial)

    @contextmanager
    def disk(self) -> Iterator[None]:
        """Turn an ``OSError`` of the block into the ``ConfigError`` that names the folder."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"work_dir={self.target} cannot be written ({error.strerror}); make room or name another folder; "
                f"finished layers are kept in {self.partial.name} and will be used"
            ) from error

    def _begin(self, marker: Marker) -> None:
        if is_folder_of(self.partial, self._source):
            raise self._occupied("the model itself")
        self.partial.mkdir(parents=True, exist_ok=True)
        if not lock(self.partial):
            raise ConfigError(
                f"work_dir={self.target} is being written by another process; wait until it ends, or name another "
                "folder"
            )
        if others := foreign_files(self.partial):
            raise self._occupied(f"files of others ({others[0]})")
        found = read_marker(self.partial)
        if found.files and not found.run and not read_marker(self.target).run:
            raise self._occupied("a finished result")
        if found.run != marker.run:
            remove_files(self.partial)
        for unfinished in self.partial.glob(".*.tmp"):
            unfinished.unlink()
        marker.write(self.partial)

    def _occupied(self, content: str) -> ConfigError:
        return ConfigError(
            f"work_dir={self.target} is written to {self.partial.name} first, which holds {content}; move that folder "
            "away, or name another work_dir"
        )

    def _weight_names(self) -> list[str]:
        return [self._weights(number).name for number in range(self._files)]

    def _record_names(self) -> list[str]:
        return [self._record(layer).name for layer in range(self._files - 1)]

    def _weights(self, number: int) -> Path:
        return self.partial / f"model-{number + 1:05d}-of-{self._files:05d}.safetensors"

    def _record(self, layer: int) -> Path:
        return self.partial / f"layer-{layer + 1:05d}.json"


def real_path(folder: str | Path) -> Path:
    """Return the absolute path of ``folder``, with links followed."""
    return Path(os.path.realpath(os.path.expanduser(folder)))


def is_folder_of(target: Path, source: Path) -> bool:
    """Return whether both paths are the same folder, also through links."""
    return target.exists() and target.samefile(source)


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Check that the resolved path ``target`` may become a result made from the model in ``source``.

    Raises ``ConfigError``, and ``OSError`` if it cannot be read.
    """
    if target == target.parent or target == Path.cwd():
        raise ConfigError(f"work_dir={target} is the current folder or the root; name a folder below it")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"work_dir={target} is a file; name a folder")
    if os.path.ismount(target):
        raise ConfigError(f"work_dir={target} is a mount point, which cannot be renamed; name a folder in it")
    if is_folder_of(target, source):
        raise ConfigError(f"work_dir={target} is the folder of the model itself; name another folder")
    if others := foreign_files(target):
        raise ConfigError(
            f"work_dir={target} exists and holds files that jaxdeploy did not write ({others[0]}); name another folder"
        )
    if not overwrite and read_marker(target).files:
        raise ConfigError(f"work_dir={target} exists and is not empty; name another, or add --overwrite")


def weight_stamps(files: TensorFiles) -> dict[str, tuple[int, int]]:
    """Return size and time of change of each file that holds tensors, to see whether the files are still the same."""
    stats = {ref.file: ref.file.stat() for ref in files.values()}
    return {str(file): (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        put_file(target, lambda handle: shutil.copyfileobj(file, handle))


def _companions(source: Path) -> list[Path]:
    """Return the small files of a model, such as the tokenizer and the chat template."""
    found = {file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not any(file.match(pattern) for pattern in _NOT_COPIED))
