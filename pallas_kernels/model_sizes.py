"""The widths of real models: whose calls bench, tuner and static check are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSizes:
    """A decoder layer: D, N, K, H and F of the glossary, and whether query, key and value have a bias."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    qkv_bias: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → (rows, columns) of the weight of each product; those that share an input are one."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            "o": (attention, self.hidden),
            "gate_up": (self.hidden, 2 * self.mlp),
            "down": (self.mlp, self.hidden),
        }


MODELS = {
    "Llama-3-8B": ModelSizes(4096, 32, 8, 128, 14336),
    "Llama-3-70B": ModelSizes(8192, 64, 8, 128, 28672),
    "InternLM2-1.8B": ModelSizes(2048, 16, 8, 128, 8192),
    "InternLM2-7B": ModelSizes(4096, 32, 8, 128, 14336),
    "InternLM2-20B": ModelSizes(6144, 48, 8, 128, 16384),
    "Qwen2.5-7B": ModelSizes(3584, 28, 4, 128, 18944, qkv_bias=True),
}
"""Name → sizes, from the models' published configurations."""

DISTINCT = {", ".join(n for n in MODELS if MODELS[n] == sizes): sizes for sizes in MODELS.values()}
"""The same, with models of equal sizes under their names together."""
