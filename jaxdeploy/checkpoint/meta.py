"""Meta's own Llama releases: ``params.json`` beside ``consolidated.NN.pth``, one file a model-parallel rank.

Differences from Hugging Face's layout, from the reference implementation (meta-llama/llama, ``model.py``): names;
ranks hold rows or columns of a matrix; and rotary pairs are neighbours (2i, 2i+1) in the rows of q and k, where
Hugging Face pairs i with i + H/2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdeploy.checkpoint.pickle_reader import read_torch_file
from jaxdeploy.checkpoint.tensor_ref import Array, TensorRef, read_file
from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.files.stored import exists, read_json

_NAMES: Mapping[str, str] = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_ROWS = ("output.weight", "wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight")
_COLUMNS = ("wo.weight", "w2.weight")
_EMBEDDING = "tok_embeddings.weight"
PARAMS = "params.json"

_MOST_RANKS = 1024
_RANK = re.compile(r"consolidated\.(\d{2,4})\.pth", re.ASCII)
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def is_meta_folder(folder: Path) -> bool:
    """Whether ``folder`` holds Meta's files and no Hugging Face configuration."""
    return exists(folder / PARAMS) and not exists(folder / "config.json")


def meta_config(folder: Path) -> dict[str, Any]:
    """What Hugging Face's ``config.json`` would say about the model that ``params.json`` describes.

    ``params.json`` states neither context length nor token ids; they follow from what tells the releases apart.
    Raises ``CheckpointError``: ``params.json`` is missing, lacks a size, or has a value of another type.
    """
    params = _params(folder)
    hidden, heads = params.whole("dim", 0), params.whole("n_heads", 0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": params.whole("n_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": params.whole("n_kv_heads", heads),
        "head_dim": hidden // heads,
        "intermediate_size": _mlp_width(params),
        "rms_norm_eps": params.number("norm_eps", 1e-5, least=1e-12, most=0.1),
        "hidden_act": "silu",
        **_from_weights(folder, params),
        **_positions(params),
    }


def _params(folder: Path) -> StoredFields:
    file = folder / PARAMS
    if not exists(file):
        raise CheckpointError(f"model={folder} has no params.json; model_format=llama needs Meta's original folder")
    params = StoredFields(read_json(file), PARAMS)
    missing = [name for name in ("dim", "n_layers", "n_heads") if params.whole(name, None) is None]
    if missing:
        raise CheckpointError(f"{file}: {', '.join(missing)} missing; download it again")
    return params


def _mlp_width(params: StoredFields) -> int:
    """Two thirds of 4 · dim, times the model's multiplier, rounded up to ``multiple_of``."""
    multiplier = params.number("ffn_dim_multiplier", 1.0, least=1e-3, most=1e3)
    width = int(multiplier * int(2 * 4 * params.whole("dim", 0) / 3))
    multiple = params.whole("multiple_of", 256)
    return -(-width // multiple) * multiple


def _from_weights(folder: Path, params: StoredFields) -> dict[str, Any]:
    """What only the weights tell: dtype, a tied head, and the vocabulary that Llama 2's files leave at -1."""
    tensors, faults, _ = open_meta(folder) if _ranks_in(folder) else ({}, (), frozenset())
    embedding, size = tensors.get("model.embed_tokens.weight"), params.whole("vocab_size", -1, least=-1)
    if embedding is None and size < 0:
        reasons = faults or (f"params.json: vocab_size={size}, and no tok_embeddings to count; download them",)
        raise CheckpointError.collect(f"model={folder} cannot be read:", reasons)
    size = size if embedding is None else embedding.shape[0]
    bos, eos = (128000, 128001) if size == 128256 else (1, 2)
    return {
        "vocab_size": size,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "tie_word_embeddings": embedding is not None and "lm_head.weight" not in tensors,
        "dtype": "bfloat16" if embedding is None else embedding.dtype.name,
    }


def _positions(params: StoredFields) -> dict[str, Any]:
    """Rotary base, scaling and trained context length: 2048 Llama 1, 4096 2, 16384 Code, 8192 3, 131072 3.1 and up."""
    theta = params.number("rope_theta", 10000.0, least=2.0, most=1e12)
    if params.flag("use_scaled_rope", False):
        scaling = {
            "rope_type": "llama3",
            "factor": params.number("rope_scaling_factor", 8.0, least=1e-3, most=1e6),
            "low_freq_factor": 1.0,
            "high_freq_factor": params.number("high_freq_factor", 4.0, least=1e-3, most=1e3),
            "original_max_position_embeddings": 8192,
        }
        return {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 131072}
    first_release = 2048 if params.values.get("norm_eps") == 1e-6 else 4096
    return {"rope_theta": theta, "max_position_embeddings": {5e5: 8192, 1e6: 16384}.get(theta, first_release)}


@dataclass(frozen=True)
class _Merged:
    """Reads one tensor from its ranks; ``heads`` is set for q and k, whose rows change places."""

    parts: Sequence[TensorRef]
    axis: int | None
    heads: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = list(self.parts[0].shape)
        if self.axis is not None:
            shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def __call__(self) -> Array:
        first = self.parts[0].read()
        if self.axis is not None and len(self.parts) > 1:
            first = np.concatenate([part.read() for part in self.parts], axis=self.axis)
        return first if self.heads is None else half_split_rows(first, self.heads)


def half_split_rows(rows: Array, heads: int) -> Array:
    """Rows [heads · H, D] whose rotary pairs are neighbours → the same rows with pair i at i and i + H/2."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(rows.shape)


def open_meta(folder: Path) -> tuple[dict[str, TensorRef], tuple[str, ...], frozenset[str]]:
    """Tensors under Hugging Face's names, and faults of files.

    Raises ``CheckpointError``: ``params.json`` is not usable, or there are no weights.
    """
    params, files = _params(folder), _ranks_in(folder)
    if not files:
        raise CheckpointError(
            f"model={folder} has no consolidated.*.pth; model_format=llama needs Meta's original folder"
        )
    ranks, faults = _read_ranks([*files, *_absent_ranks(files)])
    tensors: dict[str, TensorRef] = {}
    for name in ranks[0] if ranks and not faults else ():
        if name.endswith("rope.freqs"):
            continue
        parts = [rank[name] for rank in ranks if name in rank]
        if fault := _misfit(name, parts, len(ranks)):
            faults.append(fault)
        else:
            ref = _merge(name, parts, params)
            tensors[ref.name] = ref
    return tensors, tuple(faults), frozenset()


def _ranks_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("consolidated.*.pth") if _RANK.fullmatch(file.name))


def _absent_ranks(files: Sequence[Path]) -> list[Path]:
    """Ranks count from 00: gaps below the highest number."""
    numbers = {int(match[1]) for file in files if (match := _RANK.fullmatch(file.name))}
    expected = range(min(max(numbers) + 1, _MOST_RANKS))
    return [files[0].with_name(f"consolidated.{rank:02d}.pth") for rank in expected if rank not in numbers]


def _read_ranks(files: Sequence[Path]) -> tuple[list[dict[str, TensorRef]], list[str]]:
    ranks, faults = [], []
    for file in files:
        try:
            ranks.append(read_file(read_torch_file, file))
        except CheckpointError as error:
            faults.append(str(error))
    return ranks, faults


def _misfit(name: str, parts: Sequence[TensorRef], ranks: int) -> str | None:
    """Why the ranks' parts of a tensor cannot be put together, if they cannot."""
    if len(parts) < ranks:
        return f"{name}: in {len(parts)} of {ranks} consolidated.*.pth; download them again"
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        return f"{name}: differs in shape or dtype between consolidated.*.pth; download them again"
    if name.endswith((*_ROWS, *_COLUMNS, _EMBEDDING)) and len(parts[0].shape) != 2:
        return f"{name}: shape {list(parts[0].shape)}, a matrix expected; download it again"
    return None


def _merge(name: str, parts: Sequence[TensorRef], params: StoredFields) -> TensorRef:
    first, merged = parts[0], _Merged(parts, _axis(name, parts[0], params), _heads(name, params))
    return TensorRef(_hugging_face_name(name), merged.shape, first.dtype, first.file, first.offset, merged)


def _heads(name: str, params: StoredFields) -> int | None:
    """How many heads the rows of q or k make; None for every other tensor."""
    if name.endswith(".wk.weight"):
        return params.whole("n_kv_heads", params.whole("n_heads", 0))
    return params.whole("n_heads", 0) if name.endswith(".wq.weight") else None


def _axis(name: str, part: TensorRef, params: StoredFields) -> int | None:
    """The axis that ranks divide; None where each holds all. Llama 3 divides the embedding's rows, 1 and 2 columns."""
    if name.endswith(_ROWS):
        return 0
    if name.endswith(_COLUMNS):
        return 1
    if name == _EMBEDDING:
        return 0 if part.shape[1] == params.whole("dim", 0) else 1
    return None


def _hugging_face_name(name: str) -> str:
    """Names that are not Meta's stay as they are: the loader then calls them unexpected."""
    if match := _LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{_NAMES.get(match[2], match[2])}"
    return _NAMES.get(name, name)
