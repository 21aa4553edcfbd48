"""A decoder from a model's folder, whatever its weights are stored as."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.checkpoint.loader import dummy_params, load_params
from jaxdeploy.checkpoint.quantized import hold_quantized, without_zero_biases
from jaxdeploy.checkpoint.tensors import TensorFiles, open_checkpoint
from jaxdeploy.formats.registry import quantization_of
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder, abstract_decoder, fill, parameters_of
from jaxdeploy.models.linears import put_weight
from jaxdeploy.models.output_major import OutputMajorWeight
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import WeightTable, output_major
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
    decoder, table = abstract_decoder(model, dtype), family.weights(model)
    files = TensorFiles({}) if load_format == "dummy" else open_checkpoint(folder, model_format)
    if quantization := quantization_of(hf, model_format):
        table = hold_quantized(decoder, table, files, quantization, mesh)
        files = without_zero_biases(files, table)
    if outputs_first:
        table = _hold_outputs_first(decoder, table, mesh)
    params, place = parameters_of(decoder), partial(sharding_of, mesh)
    if load_format == "dummy":
        fill(decoder, dummy_params(params, sharding_of=place))
    else:
        fill(decoder, load_params(params, table, files, sharding_of=place, progress=progress))
    return decoder


def _hold_outputs_first(decoder: Decoder, table: WeightTable, mesh: Mesh) -> WeightTable:
    """Put an ``OutputMajorWeight`` in place of every float weight of a linear map; return the table of its rows."""
    params, sources = parameters_of(decoder), dict(table)
    for path, source in table.items():
        if path in params and source.linear is not None:
            weight = OutputMajorWeight.abstract(params[path], len(source.linear.inputs), mesh=mesh)
            put_weight(decoder, path, weight)
            sources[*path, "rows"] = output_major(sources.pop(path))
    return sources
