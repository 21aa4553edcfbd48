"""LoRA adapters (arXiv:2106.09685) in PEFT's layout → low-rank pairs for the linear maps of a decoder.

PEFT stores for each adapted module ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r]: the module then gives
``x·Wᵀ + scaling · x·Aᵀ·Bᵀ``. A linear map of ours may be several modules; its pair then has their A side by side, and
their B each in its own outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxdeploy.checkpoint.adapter_config import AGAIN, AdapterConfig, read_adapter_config
from jaxdeploy.checkpoint.base_copies import without_copies
from jaxdeploy.checkpoint.pickle_reader import read_torch_file
from jaxdeploy.checkpoint.safetensors_reader import read_safetensors_file
from jaxdeploy.checkpoint.tensor_ref import Array, TensorRef, read_file
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import exists, is_folder, user_path
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.lora import LowRank
from jaxdeploy.models.registry import Family
from jaxdeploy.models.weights import Linear, ParamPath

_FILES = {"adapter_model.safetensors": read_safetensors_file, "adapter_model.bin": read_torch_file}
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

Tensors = Mapping[str, TensorRef]
Linears = Mapping[ParamPath, Linear]


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter in host memory: for each of its ``modules`` A [K, r] and B [r, out], the scaling in B."""

    folder: Path
    modules: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest of a module."""
        return max(pair.rank for pair in self.modules.values())

    def pair(self, linear: Linear) -> LowRank | None:
        """The pair of a linear map, R the largest of its modules' ranks; ``None`` where it is not adapted."""
        pairs = [self.modules.get(module) for module in linear.modules]
        rank = max((pair.rank for pair in pairs if pair is not None), default=0)
        if not rank:
            return None
        a = np.zeros((linear.width, len(pairs), rank), np.float32)
        rows = [np.zeros((count, rank), np.float32) for count in linear.outputs.rows]
        for module, pair in enumerate(pairs):
            if pair is not None:
                a[:, module, : pair.rank], rows[module][:, : pair.rank] = pair.a, pair.b.T
        b = np.ascontiguousarray(np.moveaxis(linear.outputs.join(rows), -1, 0))
        return LowRank(a.reshape(linear.width, -1), b)


def adaptable(family: Family, model: ModelConfig) -> dict[ParamPath, Linear]:
    """The linear maps of a model by path; ``("head", "weight")`` among them, also where embeddings are tied."""
    table = family.weights(replace(model, tie_embeddings=False))
    return {path: source.linear for path, source in table.items() if source.linear is not None}


def base_tensors(family: Family, model: ModelConfig, files: Tensors) -> dict[str, TensorRef]:
    """The tensors of a model by name, a tied head among them under its own name."""
    table = family.weights(replace(model, tie_embeddings=False))
    (head,), (embedding,) = table["head", "weight"].names, table["embedding", "table"].names
    tied = {head: files[embedding]} if model.tie_embeddings and embedding in files else {}
    return {**files, **tied}


def read_adapter(
    folder: str | Path, linears: Linears, *, max_rank: int | None = None, base: Tensors | None = None
) -> AdapterWeights:
    """The adapter in ``folder`` (``adapter_config.json``, ``adapter_model.safetensors`` or ``.bin``) for ``linears``.

    Ranks of modules must not exceed ``max_rank``. ``base`` are the model's own tensors: PEFT may save copies of some
    beside the adapter, which are ignored where they are equal.

    Raises ``CheckpointError`` that lists everything that is missing, damaged, not supported, or does not fit.
    """
    path = user_path(folder)
    if not is_folder(path):
        what = "is a file" if exists(path) else "does not exist"
        raise CheckpointError(f"adapter={path} {what}; give the folder that PEFT saved the adapter to")
    config = read_adapter_config(path)
    refs, faults = _open(path)
    if config.faults:
        _refuse(path, [*config.faults, *faults])
    try:
        refs, misfits = without_copies(refs, base or {}, config.whole_modules)
        pairs, more = _paired(refs, linears, config, max_rank)
        scalings = {name: config.scaling_of(name) for name in pairs}
    except CheckpointError as error:
        raise CheckpointError(f"adapter={path}: {error}") from error
    _refuse(path, [*faults, *misfits, *more])
    modules = {name: _scaled(a, b, scalings[name]) for name, (a, b) in pairs.items()}
    _refuse(path, [f"{name}: holds values that are not finite" for name, pair in modules.items() if not _finite(pair)])
    return AdapterWeights(path, modules)


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        raise CheckpointError.collect(f"adapter={folder} does not fit the model; mend it, or give another:", faults)


def _open(folder: Path) -> tuple[Mapping[str, TensorRef], list[str]]:
    """The tensors of an adapter, and what is wrong with their file."""
    for name, read in _FILES.items():
        if exists(folder / name):
            try:
                refs = read_file(read, folder / name)
                return refs, [] if refs else [f"{name}: holds no tensors; {AGAIN}"]
            except CheckpointError as error:
                return {}, [str(error)]
    return {}, [f"{' or '.join(_FILES)}: missing; give the folder that PEFT saved the adapter to"]


def _paired(
    refs: Tensors, linears: Linears, config: AdapterConfig, max_rank: int | None
) -> tuple[dict[str, tuple[TensorRef, TensorRef]], list[str]]:
    """The two tensors of each module, and everything in which they do not fit."""
    sizes = {module: size for linear in linears.values() for module, size in _sizes(linear)}
    sides: dict[str, dict[str, TensorRef]] = {}
    faults, pairs = [], {}
    for name, ref in refs.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match["module"] not in sizes:
            faults.append(f"{name}: unexpected; the model has no such linear map")
            continue
        if not jnp.issubdtype(ref.dtype, np.floating):
            faults.append(f"{name}: dtype {ref.dtype}, floating point expected")
        sides.setdefault(match["module"], {})[match["side"]] = ref
    for module, found in sides.items():
        faults += [f"{module}: lora_{side} is missing" for side in "AB" if side not in found]
        if len(found) == 2:
            faults += _misfits(module, found["A"], found["B"], config.rank_of(module), sizes[module], max_rank)
            pairs[module] = found["A"], found["B"]
    return pairs, faults


def _sizes(linear: Linear) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each module with its outputs and inputs."""
    for module, rows in zip(linear.modules, linear.outputs.rows, strict=True):
        yield module, (rows, linear.width)


def _misfits(
    module: str, a: TensorRef, b: TensorRef, rank: int, size: tuple[int, int], max_rank: int | None
) -> Iterator[str]:
    rows, width = size
    wanted = {"A": (a, (rank, width)), "B": (b, (rows, rank))}
    for side, (ref, shape) in wanted.items():
        if ref.shape != shape:
            yield f"{module}: lora_{side} has shape {list(ref.shape)}, {list(shape)} expected"
    if max_rank is not None and rank > max_rank:
        yield f"{module}: rank {rank} is more than max_lora_rank={max_rank}; raise that"


def _scaled(a: TensorRef, b: TensorRef, scaling: float) -> LowRank:
    with np.errstate(over="ignore"):
        return LowRank(_matrix(a), _matrix(b) * np.float32(scaling))


def _matrix(ref: TensorRef) -> Array:
    """The transposed tensor, in float32 and memory of its own."""
    return np.array(ref.read().T, np.float32, order="C")


def _finite(pair: LowRank) -> bool:
    return bool(np.isfinite(pair.a).all() and np.isfinite(pair.b).all())
