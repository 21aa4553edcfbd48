"""Sequences on their way through the layers, each of which is quantised as they reach it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdeploy.compress.calibration import Calibration
from jaxdeploy.compress.evaluate import FakeQuantizedKV, Outputs, compare_outputs
from jaxdeploy.compress.forward import LayerForward, LayerParams
from jaxdeploy.compress.layer import LayerInWork
from jaxdeploy.compress.layer_view import Inputs
from jaxdeploy.compress.layout import Layout
from jaxdeploy.compress.registry import make_method
from jaxdeploy.compress.report import LinearReport, Quality
from jaxdeploy.compress.streams import HiddenStates, no_data
from jaxdeploy.compress.weights import FloatModel, Outer
from jaxdeploy.compress.work_dir import WorkDir
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import CheckpointError, JaxdeployError
from jaxdeploy.models.attention import AttentionContext, DenseContext
from jaxdeploy.models.linears import LinearSpec, NormInput
from jaxdeploy.parallel.sharding import replicated

Array = np.ndarray[Any, Any]


class Passage:
    """Takes the layers one after the other.

    Three sets of hidden states move along: the calibration text and the held-out text through what is quantised so
    far, and the held-out text through the float model. Layers that ``work`` has from a run before are passed as they
    are, so that a continued run sees what an uninterrupted one would have seen.
    """

    def __init__(
        self,
        model: FloatModel,
        config: QuantConfig,
        layout: Layout,
        work: WorkDir | None,
        data: Calibration,
        embedding: jax.Array,
        mesh: Mesh,
    ) -> None:
        self._model, self._config, self._layout, self._work, self._mesh = model, config, layout, work, mesh
        self._method = make_method(config)
        dtype = jnp.dtype("float32" if config.dtype == "auto" else config.dtype)

        def states(ids: Array) -> HiddenStates | None:
            values = np.asarray(embedding)[ids].astype(dtype)
            return HiddenStates(values, config.batch_size or 1, mesh) if ids.size else None

        self._held_out, self._scored = data.held_out, data.scored
        self._calib, self._before, self._after = states(data.calib), states(data.held_out), states(data.held_out)
        self.linears: list[LinearReport] = []
        self.kv_ranges: list[Any] = []
        self.seconds: list[float] = []

    def layer(self, index: int) -> None:
        """Quantise layer ``index``, or read it where it is done, and move everything through it.

        Raises ``CheckpointError`` where something is not finite, with the layer's name.
        """
        begin = time.perf_counter()
        config = self._model.config
        forward = LayerForward(config.layers[index], config.hidden_size)
        floats = self._model.layer(index)
        if self._work is not None and self._work.is_done(index):
            files, record = self._work.read_layer(index)
            params = self._layout.params(self._model, index, files)
        else:
            params, record = self._quantized(index, forward, floats)
        self.linears += [
            LinearReport(**{**linear, "modules": tuple(linear["modules"])}) for linear in record["linears"]
        ]
        self.kv_ranges.append(record["kv_range"])
        self._advance(index, forward, floats, params)
        self.seconds.append(time.perf_counter() - begin)

    def quality(self, around: Outer) -> Quality | None:
        """What the layers so far cost; ``None`` without held-out text."""
        measured = self.outputs(around)
        return measured and compare_outputs(*measured, self._held_out, self._scored).quality()

    def outputs(self, around: Outer) -> tuple[Outputs, Outputs] | None:
        """What the float model and the quantised one say about the held-out text. The last thing to ask for."""
        if self._before is None or self._after is None:
            return None
        return self._outputs(self._before, around), self._outputs(self._after, around)

    def _quantized(self, index: int, forward: LayerForward, floats: LayerParams) -> tuple[LayerParams, dict[str, Any]]:
        """The layer's parameters as they are stored, and what there is to say about it; both are written."""
        config, layout = self._config, self._layout
        sources, specs = self._model.sources(index), self._model.linears(index)

        def stored(path: tuple[str, ...], value: jax.Array) -> jax.Array:
            return jnp.asarray(sources[path].rounded(np.asarray(value), layout.dtype))

        view = LayerInWork(
            specs,
            floats,
            self._listener(forward, specs),
            layout.grids,
            rounded=stored,
            one_by_one=config.true_sequential and self._method.needs_gram,
        )
        try:
            self._method.quantize_layer(view)
        except JaxdeployError as error:
            raise CheckpointError(f"layers.{index}.{error}") from error
        quantized = {spec.path for spec in specs if spec.name in view.rounded}
        params = {path: value if path in quantized else stored(path, value) for path, value in view.params.items()}
        record: dict[str, Any] = {
            "linears": [dataclasses.asdict(report) for report in self._reports(index, view)],
            "kv_range": self._kv_range(forward, floats),
        }
        _check_finite(index, "a weight", params.values())
        if self._work is not None:
            self._work.write_layer(index, layout.tensors(specs, sources, params, view.rounded), record)
        return params, record

    def _listener(
        self, forward: LayerForward, specs: Sequence[LinearSpec]
    ) -> Callable[[LayerParams, Sequence[str]], dict[str, Inputs]]:
        gram, states = self._method.needs_gram, self._calib
        if states is None:
            return lambda params, names: no_data(
                _typical_sizes(specs, params, names), gram=gram, seed=self._config.seed
            )
        return lambda params, names: states.listen(forward, params, names, gram=gram)

    def _reports(self, index: int, view: LayerInWork) -> list[LinearReport]:
        sources, made = self._model.sources(index), []
        paths = {spec.name: spec.path for spec in self._model.linears(index)}
        for name, (output_error, weight_error) in view.errors.items():
            linear, grid = sources[paths[name]].linear, view.grid(name)
            assert linear is not None
            made.append(
                LinearReport(
                    index,
                    name,
                    linear.modules,
                    grid.bits,
                    grid.group_size,
                    output_error,
                    weight_error,
                    view.notes[name],
                )
            )
        return made

    def _kv_range(self, forward: LayerForward, params: LayerParams) -> list[list[float]] | None:
        """Least and largest key and value, for ``calibrate``."""
        if self._config.method != "calibrate" or self._calib is None:
            return None
        found = np.stack([np.asarray(forward.kv_range(params, batch)) for _, batch in self._calib.batches()])
        return [[float(part[:, 0].min()), float(part[:, 1].max())] for part in np.moveaxis(found, 1, 0)]

    def _advance(self, index: int, forward: LayerForward, floats: LayerParams, params: LayerParams) -> None:
        rounding = tuple(self._layout.grids) if self._config.method == "smooth_quant" else ()
        quantized = dataclasses.replace(forward, rounding=rounding)
        for states, layer, weights, context in (
            (self._calib, quantized, params, DenseContext),
            (self._before, forward, floats, DenseContext),
            (self._after, quantized, params, self._measured_context),
        ):
            if states is not None:
                whole = jax.device_put(dict(weights), replicated(self._mesh))
                states.advance(partial(_outputs_of, layer, whole, context))
        if self._before is not None:
            _check_finite(index, "what the float model makes of the text", [self._before.values])
        for states in (self._calib, self._after):
            if states is not None:
                _check_finite(index, "what the quantised model makes of the text", [states.values], self._layout.dtype)

    def _measured_context(self, sequences: int) -> AttentionContext:
        """``calibrate`` is about the KV cache; other methods leave it alone."""
        if self._config.method == "calibrate":
            return FakeQuantizedKV(sequences, self._config.kv_bits)
        return DenseContext(sequences)

    def _outputs(self, states: HiddenStates, around: Outer) -> Outputs:
        states.advance(lambda x: around.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape))
        return Outputs(states.values, around.head)


def _outputs_of(
    forward: LayerForward, params: LayerParams, context: Callable[[int], AttentionContext], x: jax.Array
) -> jax.Array:
    return forward.outputs(params, x, context(x.shape[0]))


def _typical_sizes(specs: Sequence[LinearSpec], params: LayerParams, names: Sequence[str]) -> dict[str, jax.Array]:
    """Without data: the outputs of a norm are about as large as its scale; nothing is known about other inputs."""
    sizes = {}
    for spec in specs:
        if isinstance(spec.source, NormInput):
            sizes[spec.name] = jnp.abs(params[spec.source.scale])
        else:
            sizes[spec.name] = jnp.ones(spec.width, jnp.float32)
    return {name: sizes[name] for name in names}


def _check_finite(index: int, what: str, arrays: Iterable[Any], dtype: np.dtype[Any] | None = None) -> None:
    """Raise ``CheckpointError`` unless all of it is finite, and ``dtype`` (default: their own) can hold it."""
    for array in map(np.asarray, arrays):
        most = float(jnp.finfo(dtype or array.dtype).max)
        if not (np.abs(array) <= most).all():
            limit = f"above {most:g}, which {dtype} cannot hold" if np.isfinite(array).all() else "not finite"
            raise CheckpointError(f"layers.{index}: {what} is {limit}; nothing more is written")
