"""The files of a quantisation report: JSON, and a picture as PNG."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from jaxdeploy.compress import picture
from jaxdeploy.compress.report import Report
from jaxdeploy.files.atomic import put_file

logger = logging.getLogger("jaxdeploy")

SCHEMA = "quant_report/1"
JSON_NAME = "quant_report.json"
PNG_NAME = "quant_report.png"
PACKAGES = ("jaxdeploy", "jax", "jaxlib", "flax", "numpy")


def write(report: Report, folder: Path) -> None:
    """Write ``quant_report.json`` and ``quant_report.png`` into ``folder``, and create it if it does not exist.

    An error leaves an earlier file unchanged. The JSON has the keys of the files in ``benchmarks/results/`` (``schema,
    device, versions, config, metrics, ratios``) and keys of its own. Figures that are not finite are null. Without
    matplotlib only the JSON is written, and one line is logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(as_dict(report)), indent=2, allow_nan=False, default=str) + "\n"
    put_file(folder / JSON_NAME, lambda file: file.write(text.encode()))
    try:
        put_file(folder / PNG_NAME, lambda file: picture.draw(report, file))
    except ImportError:
        logger.warning("no %s: matplotlib is not installed; pip install matplotlib (extra: quantize)", PNG_NAME)


def as_dict(report: Report) -> dict[str, Any]:
    """Return the content of the JSON file."""
    errors = [linear.output_error for linear in report.linears]
    spread = {"output_error_p50": median(errors), "output_error_max": report.worst[0].output_error} if errors else {}
    return {
        "schema": SCHEMA,
        "device": _device(),
        "versions": _versions(),
        "config": {
            "model": report.model,
            "method": report.method,
            "calibration": report.calibration,
            "settings": dict(report.settings),
        },
        "metrics": {
            **(dataclasses.asdict(report.quality) if report.quality else {}),
            **spread,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "predicted_memory_gib": dict(report.predicted_memory),
            "seconds": report.seconds,
            "seconds_per_layer": list(report.seconds_per_layer),
            "peak_memory_bytes": report.peak_memory,
        },
        "ratios": _ratios(report),
        "linears": [dataclasses.asdict(linear) for linear in report.linears],
        "kept_float": dict(report.kept_float),
        "notes": list(report.notes),
    }


def _ratios(report: Report) -> dict[str, float]:
    quality = report.quality
    loss = {"ppl_after_vs_before": quality.ppl_after / quality.ppl_before} if quality else {}
    return {**loss, "bytes_before_vs_after": report.shrink}


def _plain(value: Any) -> Any:
    """Return ``value`` with ``None`` in place of floats that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device() -> dict[str, Any]:
    import jax

    first = jax.devices()[0]
    return {"type": first.platform, "name": first.device_kind, "count": jax.device_count()}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
