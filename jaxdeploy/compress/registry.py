"""The quantisation methods: name → module, imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from jaxdeploy.compress.layer_view import LayerView
from jaxdeploy.config import QuantConfig

METHODS = {
    "awq": "jaxdeploy.compress.methods.awq",
    "calibrate": "jaxdeploy.compress.methods.calibrate",
    "gptq": "jaxdeploy.compress.methods.gptq",
    "rtn": "jaxdeploy.compress.methods.rtn",
    "smooth_quant": "jaxdeploy.compress.methods.smooth_quant",
}


class Method(Protocol):
    """Decides the integers of a layer. ``needs_gram``: whether it reads ``Inputs.gram``."""

    @property
    def needs_gram(self) -> bool:
        """Whether ``Inputs.gram`` must be there."""
        ...

    def quantize_layer(self, layer: LayerView) -> None:
        """Apply the folds that help, and store every linear of ``layer``."""
        ...


class MethodModule(Protocol):
    """What a method's module defines."""

    def make(self, config: QuantConfig) -> Method:
        """The method with the options of ``config``."""
        ...


def make_method(config: QuantConfig) -> Method:
    """The method that ``config`` names."""
    return cast(MethodModule, importlib.import_module(METHODS[config.method])).make(config)
