"""All tensors of a checkpoint folder by name, whatever files they lie in; none is read before it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxdeploy.checkpoint.meta import is_meta_folder, open_meta
from jaxdeploy.checkpoint.pickle_reader import read_torch_file
from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.checkpoint.tensor_ref import TensorRef, read_file
from jaxdeploy.errors import CheckpointError

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")


@dataclass(frozen=True, eq=False)
class TensorFiles(Mapping[str, TensorRef]):
    """A checkpoint's tensors, and what is wrong with its files.

    ``faults`` are one-line texts about files that are missing or damaged; ``lost`` the tensors that such a file should
    hold, where an index says so. Whoever loads raises them together with what else does not fit.
    """

    tensors: Mapping[str, TensorRef]
    faults: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> TensorRef:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(ref.nbytes for ref in self.values())


@dataclass(frozen=True)
class _Format:
    """How one format names its files: a whole one, an index of shards, and the shards themselves."""

    single: str
    index: str
    shards: str
    read: Callable[[Path], dict[str, TensorRef]]


_FORMATS = (
    _Format("model.safetensors", "model.safetensors.index.json", "model*.safetensors", read_safetensors_file),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_file),
)


def open_checkpoint(folder: Path, model_format: str | None = None) -> TensorFiles:
    """The tensors of ``folder`` under Hugging Face names.

    ``model_format`` "llama" is Meta's own release (``params.json`` and ``consolidated.*.pth``), and is also what a
    folder with only those files is taken for; any other value or None means Hugging Face's files, safetensors first.
    Damaged files do not raise here: they are listed in the result's ``faults``.

    Raises ``CheckpointError``: the folder holds no weights.
    """
    if model_format == "llama" or (model_format is None and is_meta_folder(folder)):
        return TensorFiles(*open_meta(folder))
    for known in _FORMATS:
        if (folder / known.single).is_file():
            return _read_files(known, [folder / known.single], {})
        if (folder / known.index).is_file():
            return _read_index(known, folder / known.index)
        if shards := sorted(folder.glob(known.shards)):
            return _read_files(known, [*shards, *_absent_siblings(shards)], {})
    raise CheckpointError(
        f"model={folder} has no weights; put model.safetensors, its shards with their index, or pytorch_model*.bin in"
    )


def _read_index(known: _Format, index: Path) -> TensorFiles:
    """The shards that an index names. It may only name files beside it."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return TensorFiles({}, (f"{index.name}: is not an index of shards; download it again",))
    shards = sorted(set(places.values()))
    if foreign := [shard for shard in shards if Path(shard).name != shard]:
        return TensorFiles({}, (f"{index.name}: names {foreign[0]}, which is not beside it; download it again",))
    return _read_files(known, [index.parent / shard for shard in shards], places)


def _absent_siblings(shards: Sequence[Path]) -> list[Path]:
    """Shards without an index count themselves (``-00001-of-00003``): those that should be there and are not."""
    names = {shard.name for shard in shards}
    absent = set()
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        for number in range(1, int(match["count"]) + 1):
            width = len(match["number"])
            absent.add(f"{match['stem']}-{number:0{width}d}-of-{match['count']}{match['suffix']}")
    return [shards[0].parent / name for name in sorted(absent - names)]


def _read_files(known: _Format, files: Sequence[Path], places: Mapping[str, str]) -> TensorFiles:
    """The tensors of ``files``; ``places`` is an index's word on which file holds what, and settles duplicates."""
    tensors: dict[str, TensorRef] = {}
    faults: list[str] = []
    damaged: set[str] = set()
    for file in files:
        try:
            held = read_file(known.read, file)
        except CheckpointError as error:
            faults.append(str(error))
            damaged.add(file.name)
            continue
        tensors |= {name: ref for name, ref in held.items() if places.get(name, file.name) == file.name}
    return TensorFiles(tensors, tuple(faults), frozenset(name for name, file in places.items() if file in damaged))
