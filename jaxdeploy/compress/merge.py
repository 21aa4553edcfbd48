"""Float checkpoint and LoRA adapter in, float checkpoint out: ``W + scaling · B·A`` (arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from jaxdeploy.checkpoint.adapter import AdapterWeights, adaptable, base_tensors, read_adapter
from jaxdeploy.checkpoint.loader import check_tensors
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import TensorFiles, open_checkpoint
from jaxdeploy.compress.work_dir import WorkDir, weight_stamps
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.formats.registry import quantization_of
from jaxdeploy.models.registry import family_of

_HEAD, _EMBEDDING = ("head", "weight"), ("embedding", "table")


@dataclass(frozen=True)
class Merged:
    """What was done: the modules that changed, and the bytes of all weights in ``work_dir``."""

    work_dir: Path
    modules: tuple[str, ...]
    nbytes: int


def merge_lora(
    model: str | Path,
    adapter: str | Path,
    work_dir: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    progress: bool = False,
) -> Merged:
    """Write the float checkpoint ``model`` with the adapter folder ``adapter`` merged into it to ``work_dir``.

    Sums are float32, stored in the dtype of the base, in as many files as it has. A tied head that is adapted becomes
    a tensor of its own. A run that was killed goes on where it was; ``progress`` shows a bar.

    Raises ``ConfigError``, ``ModelNotFoundError``, ``CheckpointError``, ``UnsupportedModelError``.
    """
    folder = resolve_model(model, revision=revision, download_dir=download_dir)
    hf = read_hf_config(folder)
    if quantization := quantization_of(hf):
        raise ConfigError(
            f"model={model} is quantised ({quantization.get('quant_method')}); merge into the float model that it was "
            "made from, and quantise the result"
        )
    family = family_of(hf)
    config, files = family.model_config(hf), open_checkpoint(folder)
    check_tensors(family.weights(config), files)
    linears = adaptable(family, config)
    weights = read_adapter(adapter, linears, base=base_tensors(family, config, files))
    shards = _shards(files)
    bases = {f"{module}.weight": (f"{module}.weight", module) for module in weights.modules}
    (head,) = linears[_HEAD].modules
    if config.tie_embeddings and head in weights.modules:
        hf = {**hf, "tie_word_embeddings": False}
        bases[f"{head}.weight"] = family.weights(config)[_EMBEDDING].names[0], head
        shards[-1].append(f"{head}.weight")
    run = {"model": str(folder), "config": hf, "adapter": _fingerprint(weights), "tensors": weight_stamps(files)}
    version = metadata.version("jaxdeploy")
    work = WorkDir(
        work_dir,
        source=folder,
        layers=len(shards) - 1,
        command="lite merge_lora",
        run={**run, "version": version},
        overwrite=overwrite,
    )
    work.check_room(files.nbytes)
    size = 0
    for index, shard in _shown(shards, progress):
        last = index == len(shards) - 1
        if not last and work.is_done(index):
            continue
        tensors = {name: _merged(files, weights, *bases.get(name, (name, None))) for name in shard}
        if last:
            size = work.write_rest(hf, tensors)
        else:
            work.write_layer(index, tensors, {})
    work.take_name()
    return Merged(work.target, tuple(weights.modules), size)


def _shards(files: TensorFiles) -> list[list[str]]:
    """The names of tensors by the file that they lie in."""
    shards = defaultdict[str, list[str]](list)
    for name, ref in files.items():
        shards[ref.file.name].append(name)
    return [shards[file] for file in sorted(shards)]


def _shown(shards: list[list[str]], progress: bool) -> Iterator[tuple[int, list[str]]]:
    from tqdm import tqdm

    return iter(tqdm(enumerate(shards), desc="merging", unit="file", total=len(shards), disable=not progress))


def _merged(files: TensorFiles, weights: AdapterWeights, base: str, module: str | None) -> Array:
    """The tensor ``base`` as it is, or the weight [out, in] that ``module`` has on top of it, in the same dtype."""
    value = files[base].read()
    if module is None:
        return value
    pair = weights.modules[module]
    with np.errstate(over="ignore"):
        merged: Array = (value.astype(np.float32) + (pair.a @ pair.b).T).astype(value.dtype)
    if not np.isfinite(merged.astype(np.float32)).all():
        raise CheckpointError(f"{module}: {value.dtype} cannot hold the merged weight; store the base in bfloat16")
    return merged


def _fingerprint(weights: AdapterWeights) -> str:
    digest = hashlib.sha256()
    for name, pair in weights.modules.items():
        digest.update(name.encode() + pair.a.tobytes() + pair.b.tobytes())
    return digest.hexdigest()
