"""Which modules of a quantised checkpoint are floats, in each layout's way of saying it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def is_skipped(module: str, config: Mapping[str, Any]) -> bool:
    """Whether ``config`` says that ``module`` is not quantised.

    AWQ and SmoothQuant have ``modules_to_not_convert``: names, or one or more whole components of them, such as
    "mlp.down_proj". compressed-tensors has ``ignore``: whole names, and regular expressions after "re:". GPTQ has
    regular expressions after "-:" among the keys of ``dynamic``, or nothing: there only the tensors tell.
    """
    ignored = config.get("ignore") or ()
    patterns = [entry.removeprefix("re:") for entry in ignored if entry.startswith("re:")]
    patterns += [key.removeprefix("-:") for key in config.get("dynamic") or {} if key.startswith("-:")]
    return (
        any(f".{entry}." in f".{module}." for entry in config.get("modules_to_not_convert") or ())
        or module in ignored
        or any(re.match(pattern, module) for pattern in patterns)
    )


def skipping_pattern(name: str) -> str:
    """A regular expression for the modules that are called ``name`` or end in it, whole components."""
    return rf"(.*\.)?{re.escape(name)}$"
