"""Writes what a benchmark or a static check found, in the one form that ``benchmarks/results/`` holds.

Every file has the same top-level keys: ``schema, git_sha, device, versions, config, metrics, ratios``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from jaxdeploy.errors import ConfigError
from jaxdeploy.files.atomic import check_replaceable, put_file

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxdeploy", "jax", "jaxlib", "flax", "numpy", "transformers", "torch")


def write_result(
    path: str | Path,
    schema: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    ratios: Mapping[str, float],
    *,
    tables: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one result as JSON, folders made, and return what was written.

    ``schema`` names the layout of ``config`` and ``metrics`` with a version, e.g. ``"generation/1"``. ``metrics`` may
    nest; its keys say their units (``decode_tok_s``, ``ttft_ms``). ``ratios`` are plain numbers to compare over time,
    ``tables`` top-level keys of this schema's own.

    Raises:
        ConfigError: A ratio is not a finite number, or the file cannot be written or holds no result.
    """
    _check_ratios(ratios)
    result = {
        "schema": schema,
        "git_sha": git_sha(),
        "device": device(),
        "versions": versions(),
        "config": dict(config),
        "metrics": dict(metrics),
        "ratios": dict(ratios),
        **(tables or {}),
    }
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    _put(Path(path), _is_result, lambda file: file.write(text.encode()))
    return result


def save_figure(figure: Any, path: str | Path, *, dpi: int = 150) -> None:
    """Write a figure of matplotlib as PNG, folders made.

    Raises:
        ConfigError: The file cannot be written, or holds something else than a PNG.
    """
    _put(Path(path), _is_png, lambda file: figure.savefig(file, format="png", dpi=dpi, facecolor="white"))


def result_path(text: str) -> Path:
    """Return the path of a result to write, for argparse: a file that holds something else is refused."""
    return _free_path(text, _is_result, "JSON result of jaxdeploy")


def picture_path(text: str) -> Path:
    """Return the path of a PNG to write, for argparse: a file that holds something else is refused."""
    return _free_path(text, _is_png, "PNG")


def _free_path(text: str, is_ours: Callable[[bytes], bool], kind: str) -> Path:
    path = Path(text)
    try:
        check_replaceable(path, is_ours)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} is no {kind} ({error.strerror}); name another file") from None
    return path


def _put(path: Path, is_ours: Callable[[bytes], bool], write: Callable[[IO[bytes]], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path, is_ours)
        put_file(path, write)
    except OSError as error:
        raise ConfigError(f"file={path} cannot be written ({error.strerror}); name another file") from error


def _is_result(content: bytes) -> bool:
    try:
        value = json.loads(content)
    except ValueError:
        return False
    return isinstance(value, dict) and {"schema", "metrics"} <= value.keys()


def _is_png(content: bytes) -> bool:
    return content.startswith(b"\x89PNG\r\n")


def git_sha(root: Path = ROOT) -> str:
    """The commit that was measured, with ``-dirty`` after it where tracked files differ; ``unknown`` outside git.

    Results do not count: a script may write one after the other.
    """
    sha = _git(root, "rev-parse", "HEAD")
    if not sha:
        return "unknown"
    return (
        f"{sha}-dirty"
        if _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        else sha
    )


def device() -> dict[str, Any]:
    """What JAX computes on, and the host beside it."""
    import jax

    first = jax.devices()[0]
    return {
        "type": first.platform,
        "name": processor() if first.platform == "cpu" else first.device_kind,
        "count": 1 if first.platform == "cpu" else jax.device_count(),
        "host_cpus": len(os.sched_getaffinity(0)),
    }


def processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions() -> dict[str, str]:
    """Python and those of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, extremes and all samples."""
    samples = [round(value, 4) for value in sorted(values)]
    return {"p50": statistics.median(samples), "min": samples[0], "max": samples[-1], "samples": samples}


def _check_ratios(ratios: Mapping[str, float]) -> None:
    for name, value in ratios.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"ratios[{name!r}]={value!r} must be a finite number; leave out what was not measured")


def _git(root: Path, *arguments: str) -> str:
    try:
        ran = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""
