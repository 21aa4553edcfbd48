"""The layouts: the name that ``config.json`` gives, and who reads it, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.formats.quantized import Array, ChannelQuantized, GroupQuantized, TensorSpec
from jaxdeploy.formats.skipped import SkippedModules, is_skipped

__all__ = ["FORMATS", "Format", "SkippedModules", "format_named", "format_of", "is_skipped", "quantization_of"]

FORMATS = {
    "awq": "jaxdeploy.formats.awq",
    "gptq": "jaxdeploy.formats.gptq",
    "gptq_v2": "jaxdeploy.formats.gptq_v2",
    "compressed-tensors": "jaxdeploy.formats.compressed_tensors",
    "smooth_quant": "jaxdeploy.formats.smooth_quant",
}
"""Name → module. ``quant_method`` is one of them; files of "gptq_v2" say "gptq", and their version elsewhere."""


class Format(Protocol):
    """What a format module defines. ``config`` is the ``quantization_config`` of a checkpoint."""

    @property
    def GROUPS(self) -> str | None:  # noqa: N802 - a constant of the module
        """Suffix of the tensor that says which group an input is in, where the layout can have one."""
        ...

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ``UnsupportedModelError``: what is not supported, and what is."""
        ...

    def group_count(self, inputs: int, config: Mapping[str, Any]) -> int | None:
        """G of a module with so many inputs, ``None`` for a scale per output. Raises ``UnsupportedModelError``."""
        ...

    def tensors(self, outputs: int, inputs: int, config: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """The tensors of a module by suffix ("qweight"). Raises ``UnsupportedModelError``: sizes that do not divide."""
        ...

    def decode(
        self, arrays: Mapping[str, Array], outputs: int, inputs: int, config: Mapping[str, Any]
    ) -> GroupQuantized | ChannelQuantized:
        """A module's arrays by suffix → the weight. Raises ``CheckpointError``: they do not fit together."""
        ...

    def encode(self, weight: GroupQuantized | ChannelQuantized, config: Mapping[str, Any]) -> dict[str, Array]:
        """The inverse of ``decode``, for a ``config`` made by ``describe``."""
        ...

    def describe(
        self, *, bits: int, group_size: int, symmetric: bool, act_order: bool, skipped: Sequence[str]
    ) -> dict[str, Any]:
        """The ``quantization_config`` that others, and ``decode``, read the result of ``encode`` by.

        ``act_order``: groups are of scattered inputs; ``skipped``: modules that stay floats, by their whole names or by
        the components they end in.
        """
        ...


def quantization_of(hf: Mapping[str, Any], model_format: str | None = None) -> dict[str, Any] | None:
    """What ``config.json`` says about quantised weights; ``None`` where they are floats.

    A ``model_format`` that is a name in ``FORMATS`` takes the place of the method it names, or of saying nothing.

    Raises ``CheckpointError``: it is not a JSON object.
    """
    fields = StoredFields(hf)
    stored = dict(fields.nested("quantization_config").values or fields.nested("compression_config").values)
    if model_format not in FORMATS:
        return stored or None
    version = {"checkpoint_format": "gptq_v2"} if model_format == "gptq_v2" else {}
    return {**stored, "quant_method": model_format.removesuffix("_v2"), **version}


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a ``quantization_config``. Raises ``UnsupportedModelError`` and ``CheckpointError``."""
    return format_named(str(StoredFields(config, "quantization_config").text("quant_method", None)))


def format_named(name: str) -> Format:
    """The format module called ``name``. Raises ``UnsupportedModelError``."""
    if name not in FORMATS:
        raise UnsupportedModelError(
            f"quant_method={name:.60} is not supported; give the float model, or one stored as {', '.join(FORMATS)}"
        )
    return cast(Format, importlib.import_module(FORMATS[name]))
