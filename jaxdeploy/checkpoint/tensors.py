"""All tensors of a checkpoint folder by name, whatever files they lie in; none is read before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from jaxdeploy.checkpoint.meta import is_meta_folder, open_meta
from jaxdeploy.checkpoint.pickle_reader import read_torch_file
from jaxdeploy.checkpoint.quantization_file import quantization_beside, weights_basename
from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.checkpoint.tensor_ref import TensorRef, read_file
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import exists, parse_json, read_bytes

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})", re.ASCII)
_QUANTIZED = ("gptq_model", "awq_model")
"""How the names begin that AutoGPTQ and AutoAWQ give to weights."""
_OTHERS = ("adapter_model", "consolidated", "training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""How the names begin of files that hold other things, or weights in another layout."""
_MOST_SHARDS = 10_000
_LISTED = 5


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
    """Files with the name ``suffix`` and what reads one of them."""

    suffix: str
    read: Callable[[Path], dict[str, TensorRef]]


_SAFETENSORS, _BIN = _Format(".safetensors", read_safetensors_file), _Format(".bin", read_torch_file)
_FORMATS = (_SAFETENSORS, _BIN, _Format(".pt", read_torch_file))


def open_checkpoint(folder: Path, model_format: str | None = None) -> TensorFiles:
    """The tensors of ``folder`` under Hugging Face names.

    ``model_format`` "llama" is Meta's own release (``params.json`` and ``consolidated.*.pth``), and is also what a
    folder with only those files is taken for; any other value or None means Hugging Face's files, safetensors first.
    Damaged files do not raise here: they are listed in the result's ``faults``.

    Raises ``CheckpointError``: the folder holds no weights.
    """
    if model_format == "llama" or (model_format is None and is_meta_folder(folder)):
        return TensorFiles(*open_meta(folder))
    for known, stem in _likely(folder):
        if (found := _open(folder, known, stem)) is not None:
            return found
    for known in _FORMATS:
        only = _only(folder, known, _stems(folder, known))
        if only is not None and (found := _open(folder, known, only)) is not None:
            return found
    raise CheckpointError(
        f"model={folder} has no weights; put model.safetensors, its shards with their index, or pytorch_model*.bin in"
    )


def _likely(folder: Path) -> Iterator[tuple[_Format, str]]:
    """Names that weights usually have, the most specific first."""
    if named := weights_basename(folder):
        yield from ((known, named) for known in _FORMATS)
    if quantization_beside(folder):
        for known in _FORMATS:
            quantized = {stem for stem in _stems(folder, known) if stem.startswith(_QUANTIZED)}
            if stem := _only(folder, known, quantized):
                yield known, stem
    yield _SAFETENSORS, "model"
    yield _BIN, "pytorch_model"


def _open(folder: Path, known: _Format, stem: str) -> TensorFiles | None:
    """The weights called ``stem``: in one file, in the shards of an index, or in shards that count themselves."""
    whole, index = folder / f"{stem}{known.suffix}", folder / f"{stem}{known.suffix}.index.json"
    if exists(whole):
        return _read_files(known, [whole], {})
    if exists(index):
        return _read_index(known, index)
    usual = stem in ("model", "pytorch_model")
    files = _weights_in(folder, known)
    shards = [file for file in files if file.name.startswith(stem) and (usual or _stem(file, known) == stem)]
    return _read_files(known, [*shards, *_absent_siblings(shards)], {}) if shards else None


def _only(folder: Path, known: _Format, stems: Set[str]) -> str | None:
    """The one of ``stems``, if there is any. Raises ``CheckpointError``: there are several."""
    if len(stems) > 1:
        names = ", ".join(f"{stem}{known.suffix}" for stem in sorted(stems)[:_LISTED])
        raise CheckpointError(f"model={folder} has several sets of weights ({names}); leave one in the folder")
    return next(iter(stems), None)


def _stems(folder: Path, known: _Format) -> Set[str]:
    """The names of all sets of weights in a format."""
    indices = folder.glob(f"*{known.suffix}.index.json")
    named = {file.name.removesuffix(f"{known.suffix}.index.json") for file in indices}
    return {stem for stem in named if not stem.startswith(_OTHERS)} | {
        _stem(file, known) for file in _weights_in(folder, known)
    }


def _weights_in(folder: Path, known: _Format) -> list[Path]:
    """The files of a format, without those that are known to hold other things than a model's weights."""
    files = folder.glob(f"*{known.suffix}")
    return sorted(file for file in files if not file.name.startswith(_OTHERS))


def _stem(file: Path, known: _Format) -> str:
    """The name of the set that a file belongs to, without the number of a shard."""
    name = file.name.removesuffix(known.suffix)
    match = _NUMBERED.fullmatch(name)
    return match["stem"] if match else name


def _read_index(known: _Format, index: Path) -> TensorFiles:
    """The shards that an index names. It may only name files beside it."""
    try:
        weight_map = parse_json(read_bytes(index), f"{index.name}:").get("weight_map")
    except CheckpointError as error:
        return TensorFiles({}, (str(error),))
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        return TensorFiles({}, (f"{index.name}: is not an index of shards; download it again",))
    shards = sorted(set(weight_map.values()))
    if foreign := [shard for shard in shards if not _is_beside(shard)]:
        return TensorFiles({}, (f"{index.name}: names {foreign[0]:.80}, which is not beside it; download it again",))
    if len(shards) > _MOST_SHARDS:
        return TensorFiles(
            {}, (f"{index.name}: names {len(shards)} shards, {_MOST_SHARDS} at most; download it again",)
        )
    return _read_files(known, [index.parent / shard for shard in shards], weight_map)


def _is_beside(shard: str) -> bool:
    return shard not in ("", ".", "..") and Path(shard).name == shard


def _absent_siblings(shards: Sequence[Path]) -> list[Path]:
    """Shards without an index count themselves (``-00001-of-00003``): those that should be there and are not.

    Raises ``CheckpointError``: the count is implausible.
    """
    names = {shard.name for shard in shards}
    absent = set()
    for name in names:
        match = _NUMBERED.fullmatch(name.removesuffix(shards[0].suffix))
        if match is None:
            continue
        if int(match["count"]) > _MOST_SHARDS:
            raise CheckpointError(f"{name}: counts {match['count']} shards, {_MOST_SHARDS} at most; rename it")
        for number in range(1, int(match["count"]) + 1):
            width = len(match["number"])
            absent.add(f"{match['stem']}-{number:0{width}d}-of-{match['count']}{shards[0].suffix}")
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
