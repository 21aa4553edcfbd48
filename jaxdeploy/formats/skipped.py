"""Which modules of a quantised checkpoint are floats, in each layout's way of saying it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxdeploy.files.fields import StoredFields
from jaxdeploy.files.patterns import StoredPatterns


class SkippedModules:
    """The modules that ``config``, a ``quantization_config``, says are not quantised.

    AWQ and SmoothQuant have ``modules_to_not_convert``: names, or one or more whole components of them, such as
    "mlp.down_proj". compressed-tensors has ``ignore``: whole names, and regular expressions after "re:". GPTQ has
    regular expressions after "-:" among the keys of ``dynamic``, or nothing: there only the tensors tell.

    Raises:
        CheckpointError: a field has another type, or a text that is not a regular expression.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        stored = StoredFields(config, "quantization_config")
        self._ignored = stored.texts("ignore")
        self._parts = stored.texts("modules_to_not_convert")
        patterns = [entry.removeprefix("re:") for entry in self._ignored if entry.startswith("re:")]
        patterns += [key.removeprefix("-:") for key in stored.nested("dynamic").values if key.startswith("-:")]
        self._patterns = StoredPatterns(patterns, "quantization_config: ignore or dynamic")

    def __contains__(self, module: str) -> bool:
        return (
            any(f".{part}." in f".{module}." for part in self._parts)
            or module in self._ignored
            or self._patterns.first(module) is not None
        )


def is_skipped(module: str, config: Mapping[str, Any]) -> bool:
    """Whether ``config`` says that ``module`` is not quantised. Raises as ``SkippedModules``."""
    return module in SkippedModules(config)


def skipping_pattern(name: str) -> str:
    """A regular expression for the modules that are called ``name`` or end in it, whole components."""
    return rf"(.*\.)?{re.escape(name)}$"
