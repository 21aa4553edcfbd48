"""``jaxdeploy check_env``: what a bug report needs to know about a machine."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxdeploy.cli.flags import Namespace, Parser
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.atomic import check_replaceable, is_json, put_text

PACKAGES = (
    "jaxdeploy", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy", "safetensors",
    "orbax-checkpoint", "transformers", "tokenizers", "sentencepiece", "huggingface_hub", "fastapi", "uvicorn", "torch",
)  # fmt: skip
GIB = 2**30


def add_arguments(parser: Parser) -> None:
    """The one flag."""
    parser.add_argument("--dump-file", metavar="FILE.json", help="write the report to this file, as JSON")


def run(args: Namespace) -> int:
    """Print the report, and write it if asked."""
    report = environment()
    print(as_text(report))
    if args.dump_file:
        _write(Path(args.dump_file), report)
    return 0


def environment() -> dict[str, Any]:
    """Versions, devices with their memory in bytes, and the kernel backends."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "nvidia_driver": _nvidia_driver(),
        "devices": _devices(),
        "kernels": _kernels(),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people to read."""
    lines = [f"python     {report['python']}", f"platform   {report['platform']}"]
    lines += [f"driver     {report['nvidia_driver'] or 'no NVIDIA driver found'}", "", "Versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["", "Devices", *(f"  {_device_line(device)}" for device in report["devices"])]
    lines += ["", "Kernel backends", *(f"  {_kernel_line(kernel)}" for kernel in report["kernels"])]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _devices() -> list[dict[str, Any]]:
    import jax

    return [_device(device) for device in jax.local_devices()]


def _device(device: Any) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "name": str(device),
        "kind": device.device_kind,
        "platform": device.platform,
        "memory_bytes": stats.get("bytes_limit"),
        "memory_in_use_bytes": stats.get("bytes_in_use"),
    }


def _device_line(device: dict[str, Any]) -> str:
    total, used = device["memory_bytes"], device["memory_in_use_bytes"]
    memory = "host memory" if total is None else f"{total / GIB:.1f} GiB for JAX, {(used or 0) / GIB:.1f} GiB in use"
    return f"{device['name']} ({device['kind']}): {memory}"


def _kernels() -> list[dict[str, Any]]:
    from pallas_kernels import backend_report

    names = ("op", "backend", "usable", "reason")
    return [dict(zip(names, status, strict=True)) for status in backend_report()]


def _kernel_line(kernel: dict[str, Any]) -> str:
    verdict = "usable" if kernel["usable"] else f"not usable: {kernel['reason']}"
    return f"{kernel['op']}/{kernel['backend']}: {verdict}"


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        check_replaceable(path, is_json(dict))
        put_text(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"dump_file={str(path)!r} cannot be written ({error.strerror}); name another file") from None
