"""Quantise a model as a config file says: python scripts/quantize.py --config configs/quant/awq-w4g128.yaml model=DIR.

Keys of the file are ``model``, ``method`` and the settings of ``jaxdeploy lite``; ``key=value`` arguments win over it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxdeploy.cli.lite import show
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import ConfigError, JaxdeployError
from jaxdeploy.settings import describe, parse_text, read_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="e.g. configs/quant/awq-w4g128.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. model=DIR work_dir=OUT calib_samples=64")
    args = parser.parse_args(argv)
    try:
        model, config = read(args.config, args.settings)
        show(model, config)
    except JaxdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read(path: str, pairs: Sequence[str]) -> tuple[str, QuantConfig]:
    """Model and settings of the file at ``path``, with ``pairs`` of "key=value" over them. Raises ``ConfigError``."""
    given: dict[str, Any] = read_yaml(path)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"argument={pair!r} must read key=value; for example model=DIR")
        name = name.replace("-", "_")
        known = describe(QuantConfig).get(name)
        value = parse_text(QuantConfig, name, text) if known else text
        given[name] = text.split(",") if known and known.is_list else value
    model = given.pop("model", None)
    if model is None:
        raise ConfigError("model is not given; add model=DIR, or a model: line to the file")
    return str(model), QuantConfig(**given)


if __name__ == "__main__":
    sys.exit(main())
