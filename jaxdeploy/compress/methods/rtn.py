"""Round to nearest: every weight on its own, with scales that span its group. No data is needed."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdeploy.compress.grid import round_to_nearest
from jaxdeploy.compress.layer_view import LayerView
from jaxdeploy.config import QuantConfig


@dataclass(frozen=True)
class RoundToNearest:
    """Rounds each linear as it is."""

    needs_gram: bool = False

    def quantize_layer(self, layer: LayerView) -> None:
        """See ``registry.Method``."""
        for name in layer.linears:
            layer.store(name, round_to_nearest(layer.weight(name), layer.grid(name)))


def make(config: QuantConfig) -> RoundToNearest:
    """See ``registry.MethodModule``."""
    return RoundToNearest()
