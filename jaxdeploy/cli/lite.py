"""``jaxdeploy lite``: quantise a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import ConfigError

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


def add_arguments(parser: Parser) -> None:
    """METHOD, MODEL, and every setting of a quantisation."""
    parser.add_argument("method", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("model", metavar="MODEL", help="a folder with a float checkpoint, or an id on the hub")
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a file, e.g. `w_group_size: 64`")
    add_settings(parser, QuantConfig)


def run(args: Namespace) -> int:
    """Quantise, and show what it cost."""
    name = args.method.replace("-", "_")
    if name not in METHODS:
        raise ConfigError(f"method={args.method!r} is unknown; choose one of {', '.join(METHODS)}")
    (given,) = read_settings(args, QuantConfig)
    show(args.model, QuantConfig(**{**given, "method": METHODS[name]}))
    return 0


def show(model: str, config: QuantConfig) -> Report:
    """Quantise ``model`` with a bar on stderr, and print the report."""
    from rich.console import Console

    from jaxdeploy.compress import report as reports
    from jaxdeploy.compress.quantize import quantize

    report = quantize(model, config, progress=True)
    reports.show(report, Console())
    return report
