"""Run the calibration text and change nothing: for the statistics and scales that calibration itself collects."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdeploy.compress.layer_view import LayerView
from jaxdeploy.config import QuantConfig


@dataclass(frozen=True)
class Calibrate:
    """Leaves every weight as it is."""

    needs_gram: bool = False

    def quantize_layer(self, layer: LayerView) -> None:
        """Store nothing."""


def make(config: QuantConfig) -> Calibrate:
    """See ``registry.MethodModule``."""
    return Calibrate()
