"""Finds the copies of base-model tensors in a PEFT adapter and compares them with the base model.

PEFT stores the weight under an adapted head or embedding as ``lm_head.base_layer.weight``, resized embeddings under
their own names, and trained copies of whole modules (``modules_to_save``) under theirs. An adapter here changes linear
maps by low-rank products only, so these tensors must be equal to the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxdeploy.checkpoint.tensor_ref import TensorRef
from jaxdeploy.files.stored import shown

_PREFIX = "base_model.model."
_WRAPPERS = (".base_layer.", ".original_module.", ".modules_to_save.default.", ".modules_to_save.")
_ROWS_BYTES = 2**24
"""Tensors are compared in pieces of this size."""

Tensors = Mapping[str, TensorRef]


def without_copies(
    refs: Tensors, base: Tensors, whole_modules: Sequence[str]
) -> tuple[dict[str, TensorRef], list[str]]:
    """Return the adapter's ``refs`` without copies of tensors in ``base``, and a fault for each copy that differs.

    ``whole_modules`` are named in ``modules_to_save``; each must come with a tensor that can be compared.
    """
    kept, faults, copied = {}, [], set()
    for name, ref in refs.items():
        own = _base_name(name)
        if own is None:
            kept[name] = ref
            continue
        copied.add(own)
        if fault := _difference(ref, own, base):
            faults.append(f"{name}: {fault}")
    if absent := [module for module in whole_modules if not any(f".{module}." in f".{name}" for name in copied)]:
        faults.append(f"modules_to_save={shown(absent)}: whole modules cannot differ between requests; train without")
    return kept, faults


def _base_name(name: str) -> str | None:
    """Return the name of the model's tensor that ``name`` copies; ``None`` for other tensors."""
    if not name.startswith(_PREFIX) or ".lora_" in name:
        return None
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, ".")
    return name.removeprefix(_PREFIX)


def _difference(ref: TensorRef, own: str, base: Tensors) -> str | None:
    """Return why the copy ``ref`` of the tensor ``own`` cannot be ignored; ``None`` if it can."""
    if own not in base:
        return f"unexpected; the model has no tensor {own} to compare it with"
    if ref.shape != base[own].shape:
        return f"shape {list(ref.shape)} is not {list(base[own].shape)}, the model's; use the model it was trained on"
    if not _equal(ref, base[own]):
        return "differs from the model's; an adapter cannot change whole modules, so merge it with PEFT"
    return None


def _equal(copy: TensorRef, own: TensorRef) -> bool:
    """Return whether two tensors of one shape are equal in the coarser of their types."""
    values, wanted = copy.read().reshape(-1), own.read().reshape(-1)
    dtype = min(copy.dtype, own.dtype, key=lambda each: each.itemsize)
    step = _ROWS_BYTES // max(copy.dtype.itemsize, own.dtype.itemsize)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            np.array_equal(values[at : at + step].astype(dtype), wanted[at : at + step].astype(dtype))
            for at in range(0, len(values), step)
        )
