"""What a decoder is made of, in this project's own words. Families translate a checkpoint's ``config.json`` into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxdeploy.errors import CheckpointError, UnsupportedModelError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) and how it is stretched to longer contexts.

    ``original_length`` is the context length (tokens) that the stretching starts from. ``attention_factor`` multiplies
    cos and sin (YaRN, arXiv:2309.00071); ``None`` derives it from the other fields.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder; shape letters as in ``docs/glossary.md``.

    ``windows`` holds one sliding window per layer, ``None`` for full attention: a query sees itself and the
    ``window - 1`` tokens before it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_position: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dtype: str = "float32"

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head (N / K)."""
        return self.num_heads // self.num_kv_heads

    def with_dynamic_rope(self, factor: float) -> ModelConfig:
        """The same model with dynamic NTK scaling by ``factor`` (LMDeploy's ``rope_scaling_factor``)."""
        return replace(self, rope=replace(self.rope, kind="dynamic", factor=factor, original_length=self.max_position))


def read_decoder(hf: Mapping[str, Any], **options: Any) -> ModelConfig:
    """The fields that Llama-like ``config.json`` files share; ``options`` are a family's own and win.

    Raises ``CheckpointError`` that lists every missing field, ``UnsupportedModelError`` for an unknown option value.
    """
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [f"config.json: {name} is missing; add it" for name in required if hf.get(name) is None]
    if missing:
        raise CheckpointError.collect("config.json does not describe a decoder:", missing)
    _check_activation(str(hf.get("hidden_act") or "silu"))
    layers, heads, hidden = int(hf["num_hidden_layers"]), int(hf["num_attention_heads"]), int(hf["hidden_size"])
    kv_heads = int(hf.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; mend config.json"
        )
    fields: dict[str, Any] = {
        "vocab_size": int(hf["vocab_size"]),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": int(hf.get("head_dim") or hidden // heads),
        "intermediate_size": int(hf["intermediate_size"]),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "max_position": int(hf.get("max_position_embeddings", 2048)),
        "rope": read_rope(hf),
        "windows": (None,) * layers,
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
    }
    return ModelConfig(**{**fields, **options})


def read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta`` beside ``rope_scaling``."""
    scaling: dict[str, Any] = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"rope_type={kind} is not supported; supported are {', '.join(ROPE_KINDS)}")
    name = "original_max_position_embeddings"
    original = (hf.get(name) or scaling.get(name)) if kind in ("llama3", "yarn") else None
    max_position = int(hf.get("max_position_embeddings", 2048))
    factor = scaling.get("factor")
    if factor is None:
        factor = max_position / int(original) if original else 1.0
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    known = {name: float(scaling[name]) for name in names if scaling.get(name) is not None}
    attention_factor = scaling.get("attention_factor")
    return RopeConfig(
        theta=float(scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(factor),
        original_length=int(original or max_position),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(scaling.get("truncate", True)),
        **known,
    )


def _check_activation(name: str) -> None:
    if name not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act={name} is not supported; supported is silu")
