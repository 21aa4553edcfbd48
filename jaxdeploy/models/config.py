"""The options of a model, in this project's own words. Families translate a checkpoint's ``config.json`` into them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxdeploy.models.block import BlockConfig


@dataclass(frozen=True)
class ModelConfig:
    """The options of a decoder; shape letters as in ``docs/glossary.md``.

    ``vocab_size``: V.
    ``hidden_size``: size of the residual stream, D.
    ``layers``: options of each layer. Neighbours that are equal share one traced program.
    ``norm_eps``: of the last norm.
    ``max_position``: tokens of the longest context that the model was trained for.
    ``tie_embeddings``: the embedding table is the output projection too.
    ``dtype``: of the stored weights.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[BlockConfig, ...]
    norm_eps: float
    max_position: int
    tie_embeddings: bool = False
    dtype: str = "float32"

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def with_dynamic_rope(self, factor: float) -> ModelConfig:
        """The same model with dynamic NTK scaling by ``factor`` (LMDeploy's ``rope_scaling_factor``)."""
        return replace(self, layers=tuple(layer.with_dynamic_rope(factor, self.max_position) for layer in self.layers))
