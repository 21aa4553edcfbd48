"""A decoder from a model's folder, whatever its weights are stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from jaxdeploy.parallel.mesh import on_cpu
from jaxdeploy.parallel.sharding import sharding_of


@dataclass(frozen=True)
class LoadOptions:
    """How weights are read and held.

    Attributes:
        dtype: dtype of float weights.
        model_format: see ``EngineConfig``.
        load_format: see ``EngineConfig``.
        outputs_first: float weights are held as ``OutputMajorWeight``.
        progress: show a bar on stderr.
    """

    dtype: jnp.dtype
    model_format: str | None = None
    load_format: str = "auto"
    outputs_first: bool = False
    progress: bool = False


def float_dtype(name: str, model: ModelConfig, mesh: Mesh) -> jnp.dtype:
    """Return the dtype that a setting ``dtype`` means. ``auto``: float32 on a CPU, otherwise that of the checkpoint."""
    if name == "auto":
        name = "float32" if on_cpu(mesh) else model.dtype
    return jnp.dtype(name)


def load_model(
    folder: Path, hf: Mapping[str, Any], mesh: Mesh, options: LoadOptions, model: ModelConfig | None = None
) -> Decoder:
    """Return the decoder in ``folder``, whose ``config.json`` is ``hf``, on ``mesh``.

    ``model`` replaces the options in ``hf``.

    Raises ``CheckpointError``, ``UnsupportedModelError``.
    """
    family = family_of(hf)
    model = model or family.model_config(hf)
    decoder, table = abstract_decoder(model, options.dtype), family.weights(model)
    files = TensorFiles({}) if options.load_format == "dummy" else open_checkpoint(folder, options.model_format)
    if quantization := quantization_of(hf, options.model_format):
        table = hold_quantized(decoder, table, files, quantization, mesh)
        files = without_zero_biases(files, table)
    if options.outputs_first:
        table = _hold_outputs_first(decoder, table, mesh)
    params, place = parameters_of(decoder), partial(sharding_of, mesh)
    if options.load_format == "dummy":
        fill(decoder, dummy_params(params, sharding_of=place))
    else:
        fill(decoder, load_params(params, table, files, sharding_of=place, progress=options.progress))
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
