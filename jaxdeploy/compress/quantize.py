"""Float checkpoint in, quantised checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeploy.checkpoint.kv_parameters import file_names, write_kv_parameters
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.compress import report_files
from jaxdeploy.compress.beside_model import BesideModel
from jaxdeploy.compress.calibration import Calibration, Windows, calibration_ids
from jaxdeploy.compress.layout import Layout
from jaxdeploy.compress.passage import Passage
from jaxdeploy.compress.report import LinearReport, Report
from jaxdeploy.compress.weights import FloatModel, Outer
from jaxdeploy.compress.work_dir import WorkDir, is_folder_of, real_path, weight_stamps
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.formats.registry import quantization_of
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.models.registry import architecture_of
from jaxdeploy.models.weights import ParamPath
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]


def quantize(
    model: str | Path,
    config: QuantConfig | None = None,
    *,
    token_ids: Sequence[Sequence[int]] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Report:
    """Make the model ``model`` (a folder, or an id on the hub) small, and write the result to ``config.work_dir``.

    Args:
        model: a float checkpoint of any family that ``jaxdeploy list`` shows.
        config: how.
        token_ids: sequences to calibrate with, in place of ``config.calib_dataset``.
        progress: show a bar, with the time that is left.
        **settings: fields of ``QuantConfig``, laid over ``config``.

    Returns:
        What was done and what it cost in quality; ``quant_report.json`` and ``.png`` in the folder say the same.

    Raises:
        ConfigError: a setting, the calibration text or the folder does not fit.
        CheckpointError: the checkpoint is damaged, or a layer's result is not finite.
        UnsupportedModelError: an architecture that is not there.
    """
    config = dataclasses.replace(config or QuantConfig(), **settings)
    folder = resolve_model(model, revision=config.revision, download_dir=config.download_dir)
    hf = read_hf_config(folder)
    if quantization := quantization_of(hf):
        raise ConfigError(
            f"model={model} is quantised already ({quantization.get('quant_method')}); give the float model"
        )
    float_model = FloatModel.open(folder, hf, config.load_format)
    layout = Layout.of(float_model, config)
    data = _calibration(float_model, config, token_ids)
    return _Run(str(model), float_model, config, layout, data, progress).report()


def _calibration(model: FloatModel, config: QuantConfig, token_ids: Sequence[Sequence[int]] | None) -> Calibration:
    """Token ids to calibrate and to measure with; random ones beside random weights."""
    samples, seqlen, held_out = config.calib_samples or 0, config.calib_seqlen or 0, config.eval_samples or 0
    if token_ids is None and config.load_format == "dummy":
        drawn = np.random.default_rng(config.seed).integers(
            0, model.config.vocab_size, (samples + held_out, seqlen), np.int32
        )
        return Calibration(drawn[:samples], drawn[samples:], "random tokens", None)
    tokenizer = Tokenizer.load(model.folder)
    own = held_out if config.eval_dataset is None else 0
    architecture = architecture_of(model.hf)
    cut = partial(
        calibration_ids,
        tokenizer=tokenizer,
        folder=model.folder,
        architecture=architecture,
    )
    data = cut(token_ids or config.calib_dataset, asked=Windows(samples, own, seqlen, config.seed))
    if config.eval_dataset is None or not held_out:
        return data
    other = cut(config.eval_dataset, asked=Windows(0, held_out, seqlen, config.seed))
    notes = "; ".join(note for note in (data.note, other.note) if note)
    source = f"{data.source}, measured on {other.source}"
    return Calibration(data.calib, other.held_out, source, notes or None, other.scored)


@dataclass
class _Run:
    """One quantisation, from the first layer to the last."""

    name: str
    model: FloatModel
    config: QuantConfig
    layout: Layout
    data: Calibration
    progress: bool

    def report(self) -> Report:
        """Quantise every layer, write the result, and say what it is worth."""
        start, mesh = time.perf_counter(), make_mesh(self.config.tp)
        beside, work = self._beside(), self._work_dir()
        outer = self.model.outer()
        passage = Passage(self.model, self.config, self.layout, work, self.data, outer["embedding", "table"], mesh)
        for index in self._layers():
            passage.layer(index)
        quality = passage.quality(Outer.of(self.model.config, outer))
        size = self.model.nbytes if work is None else self._write(work, passage, outer)
        report = Report(
            model=self.name,
            method=self.config.method,
            settings=dataclasses.asdict(self.config),
            calibration=self.data.source,
            linears=tuple(passage.linears),
            quality=quality,
            kept_float=self.layout.kept,
            bytes_before=self.model.nbytes,
            bytes_after=size,
            predicted_memory=self._predicted(size),
            seconds=time.perf_counter() - start,
            seconds_per_layer=passage.seconds,
            peak_memory=_peak_memory(mesh.devices.flat[0]),
            notes=tuple(self._notes(passage.linears)),
        )
        if work is not None:
            with work.disk():
                report_files.write(report, work.partial)
            work.take_name()
        if beside is not None:
            beside.write(report, self._kv_parameters(passage))
        return report

    @property
    def _writes(self) -> bool:
        """Whether there is a result to write; without one the model is only measured."""
        held = self.layout.quantization is not None or not self.layout.grids
        return self.config.num_layers is None and held

    @property
    def _is_beside(self) -> bool:
        """Whether the result goes into the folder of the model itself, as in LMDeploy's documents."""
        target = real_path(self.config.work_dir)
        return self._writes and self.config.method == "calibrate" and is_folder_of(target, self.model.folder)

    def _beside(self) -> BesideModel | None:
        """The model's own folder, if the result goes there."""
        if not self._is_beside:
            return None
        layers = self.model.config.num_layers
        return BesideModel(self.model.folder, num_layers=layers, overwrite=self.config.overwrite)

    def _work_dir(self) -> WorkDir | None:
        """The folder of a new checkpoint, if one is written."""
        if not self._writes or self._is_beside:
            return None
        depends = {"model": self.name, "config": self.model.hf, "settings": dataclasses.asdict(self.config)}
        tokens = hashlib.sha256(self.data.calib.tobytes() + self.data.held_out.tobytes()).hexdigest()
        layers = self.model.config.num_layers
        stamps = None if self.model.files is None else weight_stamps(self.model.files)
        run = {**depends, "tokens": tokens, "weights": stamps, "version": metadata.version("jaxdeploy")}
        work = WorkDir(
            self.config.work_dir,
            source=self.model.folder,
            layers=layers,
            command=f"lite {self.config.method}",
            run=run,
            extra=(report_files.JSON_NAME, report_files.PNG_NAME, *file_names(layers)),
            overwrite=self.config.overwrite,
        )
        work.check_room(self.layout.expected_bytes(self.model))
        return work

    def _layers(self) -> Iterable[int]:
        from tqdm import tqdm

        count = min(self.config.num_layers or self.model.config.num_layers, self.model.config.num_layers)
        return tqdm(range(count), desc=self.config.method, unit="layer", disable=not self.progress)

    def _write(self, work: WorkDir, passage: Passage, outer: Mapping[ParamPath, jax.Array]) -> int:
        """Everything but the layers; returns the bytes of all weights."""
        rest: dict[str, Array] = {}
        for path, source in self.model.outer_sources().items():
            rest |= self.layout.floats(source, outer[path])
        hf = {name: value for name, value in self.model.hf.items() if name != "quantization_config"}
        if self.layout.quantization is not None:
            hf["quantization_config"] = dict(self.layout.quantization)
        size = work.write_rest(hf, rest)
        parameters = self._kv_parameters(passage)
        if parameters is not None:
            with work.disk():
                write_kv_parameters(work.partial, parameters)
        return size

    def _kv_parameters(self, passage: Passage) -> Array | None:
        """What ``calibrate`` found; ``None`` for 4 bits, as the files make quant_policy 4 mean 8 bits."""
        if self.config.kv_bits != 8 or not all(passage.kv_ranges):
            return None
        return _kv_parameters(passage.kv_ranges)

    def _predicted(self, weights: int) -> dict[str, float]:
        """GiB of device memory: weights, and 1000 tokens of KV cache by ``quant_policy``."""
        layouts = cache_layouts(self.model.config)
        sizes = {"weights": weights}
        for bits in (16, 8, 4):
            dtype = CacheDtype(jnp.dtype(jnp.float16), None if bits == 16 else bits)
            size = sum(layout.bytes_per_block(1000, dtype) for layout in layouts)
            sizes[f"KV cache, 1000 tokens in {bits} bits"] = size
        return {name: size / 2**30 for name, size in sizes.items()}

    def _notes(self, linears: Sequence[LinearReport]) -> Iterator[str]:
        if self.data.note:
            yield self.data.note
        if lost := sum(bool(linear.note) for linear in linears):
            yield (
                f"{lost} of {len(linears)} matrices do without what a search found, because it lost to rounding to "
                "nearest on calibration text that the search had not seen"
            )
        if not self.data.calib.size:
            yield "calibrated without data: activations count by the scales of the norms before them"
        if not self._writes:
            yield "measured only, nothing is written" + (
                "" if self.config.num_layers else f": no layout holds {self.config.method} at {self.config.w_bits} bits"
            )


def _kv_parameters(ranges: Sequence[Sequence[Sequence[float]]]) -> Array:
    """[L, 4] of LMDeploy 0.3: scale and zero point of keys, then of values."""
    pairs = np.asarray(ranges, np.float32)
    low, high = pairs[..., 0], pairs[..., 1]
    parameters: Array = np.stack([(high - low) / 255, (low + high) / 2], axis=-1).reshape(len(pairs), 4)
    return parameters


def _peak_memory(device: jax.Device) -> int | None:
    """Bytes: of the device where it counts them, else of this process."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats is not None:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
