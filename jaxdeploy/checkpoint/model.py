"""A decoder from a model's folder, whatever its weights are stored as."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.checkpoint.loader import AbstractParams, dummy_params, load_params
from jaxdeploy.checkpoint.quantized import hold_quantized, without_zero_biases
from jaxdeploy.checkpoint.tensors import TensorFiles, open_checkpoint
from jaxdeploy.formats.registry import quantization_of
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder, abstract_params, decoder_from
from jaxdeploy.models.output_major import output_major_leaves
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import ParamPath, Source, WeightTable, output_major
from jaxdeploy.parallel.mesh import TP_AXIS, axis_size
from jaxdeploy.parallel.sharding import sharding_of


def load_model(
    folder: Path,
    hf: Mapping[str, Any],
    *,
    mesh: Mesh,
    dtype: jnp.dtype,
    model: ModelConfig | None = None,
    model_format: str | None = None,
    load_format: str = "auto",
    outputs_first: bool = False,
    progress: bool = False,
) -> Decoder:
    """The decoder in ``folder``, whose ``config.json`` is ``hf``, on ``mesh``.

    ``model`` replaces what ``hf`` says, ``dtype`` is that of float weights, ``model_format`` and ``load_format`` are
    those of ``EngineConfig``; ``outputs_first`` holds float weights as ``OutputMajorWeight``; ``progress`` shows a bar.

    Raises ``CheckpointError``, ``UnsupportedModelError``.
    """
    family = family_of(hf)
    model = model or family.model_config(hf)
    params, place, table = abstract_params(model, dtype), partial(sharding_of, mesh), family.weights(model)
    files = TensorFiles({}) if load_format == "dummy" else open_checkpoint(folder, model_format)
    if quantization := quantization_of(hf, model_format):
        params, table = hold_quantized(params, table, files, quantization, axis_size(mesh, TP_AXIS))
        files = without_zero_biases(files, table)
    if outputs_first:
        params, table = _outputs_first(params, table)
    if load_format == "dummy":
        return decoder_from(model, dummy_params(params, sharding_of=place), mesh)
    return decoder_from(model, load_params(params, table, files, sharding_of=place, progress=progress), mesh)


def _outputs_first(
    params: AbstractParams, table: WeightTable
) -> tuple[dict[ParamPath, nnx.Param[Any]], dict[ParamPath, Source]]:
    """Parameters and table with every float weight of a linear map as the leaf of an ``OutputMajorWeight``."""
    held, sources = dict(params), dict(table)
    for path, source in table.items():
        if path in params and source.linear is not None:
            ((name, leaf),) = output_major_leaves(held.pop(path), len(source.linear.inputs)).items()
            held[*path, name], sources[*path, name] = leaf, output_major(sources.pop(path))
    return held, sources
