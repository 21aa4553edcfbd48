"""``jaxdeploy lite``: quantise a model, or merge an adapter into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import read_yaml

if TYPE_CHECKING:
    from jaxdeploy.compress.report import Report

METHODS = {
    "auto_awq": "awq",
    "auto_gptq": "gptq",
    "smooth_quant": "smooth_quant",
    "calibrate": "calibrate",
    "rtn": "rtn",
}
"""LMDeploy's names of the methods."""

MERGE = "merge_lora"
_MERGING = ("work_dir", "overwrite", "revision", "download_dir")
"""The settings that merging has."""


def add_arguments(parser: Parser) -> None:
    """METHOD, MODEL, ADAPTER, and every setting of a quantisation."""
    parser.add_argument("method", metavar="METHOD", help=", ".join((*METHODS, MERGE)))
    parser.add_argument("model", metavar="MODEL", help="a folder with a float checkpoint, or an id on the hub")
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", help=f"{MERGE}: the folder of a LoRA adapter")
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a file, e.g. configs/quant/awq-w4g128.yaml")
    add_settings(parser, QuantConfig)


def run(args: Namespace) -> int:
    """Quantise, and show what it cost; or merge."""
    name = args.method.replace("-", "_")
    (given,) = read_settings(args, QuantConfig, skipped=("method",))
    if name == MERGE:
        _merge(args.model, args.adapter, given)
        return 0
    if name not in METHODS:
        raise ConfigError(f"method={args.method!r} is unknown; choose one of {', '.join((*METHODS, MERGE))}")
    if args.adapter is not None:
        raise ConfigError(f"argument={args.adapter!r} is one too many: {args.method} takes no adapter; leave it out")
    _check_file(args.config, args.method, METHODS[name])
    show(args.model, QuantConfig(**{**given, "method": METHODS[name]}))
    return 0


def _check_file(path: str | None, argument: str, method: str) -> None:
    """Raise ``ConfigError`` if the file at ``path`` is for another method than the command line names."""
    named = method if path is None else read_yaml(path).get("method", method)
    if METHODS.get(str(named).replace("-", "_"), named) != method:
        raise ConfigError(f"method={named!r} of {path} is not {argument}; give the method that the file is for")


def _merge(model: str, adapter: str | None, given: dict[str, Any]) -> None:
    """Merge with a bar on stderr, and say where the result is."""
    from jaxdeploy.compress.merge import merge_lora

    if adapter is None:
        raise ConfigError(f"{MERGE} needs an adapter behind MODEL; give the folder that PEFT saved it to")
    if odd := [name for name in given if name not in _MERGING]:
        raise ConfigError(f"{odd[0]}={given[odd[0]]!r} means nothing to {MERGE}; leave it out")
    settings = {"work_dir": QuantConfig().work_dir, **given}
    merged = merge_lora(model, adapter, **settings, progress=True)
    print(f"{len(merged.modules)} modules merged, {merged.nbytes / 2**20:.1f} MiB in {merged.work_dir}")


def show(model: str, config: QuantConfig) -> Report:
    """Quantise ``model`` with a bar on stderr, and print the report."""
    from rich.console import Console

    from jaxdeploy.compress import report as reports
    from jaxdeploy.compress.quantize import quantize

    report = quantize(model, config, progress=True)
    reports.show(report, Console())
    return report
