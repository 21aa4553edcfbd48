"""The fields that ``config.json`` files of decoders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.files.fields import StoredFields
from jaxdeploy.files.stored import shown
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.dense import DenseDecoder
from jaxdeploy.models.rope import ROPE_KINDS, RopeConfig

DEFAULT_MAX_POSITION = 2048

_WIDEST = 2**24
"""More than any size of a layer, or any vocabulary."""
_DEEPEST = 1000
"""More layers than any model has."""
_DTYPES = ("float32", "bfloat16", "float16")


def read_decoder(hf: Mapping[str, Any], **options: Any) -> ModelConfig:
    """The fields that Llama-like ``config.json`` files share; ``options`` are a family's own and win.

    Raises ``CheckpointError`` that lists every missing field, or names one of another type or out of range;
    ``UnsupportedModelError`` for an unknown option value.
    """
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [f"config.json: {name} is missing; add it" for name in required if hf.get(name) is None]
    if missing:
        raise CheckpointError.collect("config.json does not describe a decoder:", missing)
    stored = StoredFields(hf)
    _check_activation(stored)
    layers, hidden = read_layer_count(hf), stored.whole("hidden_size", 0, most=_WIDEST)
    heads = stored.whole("num_attention_heads", 0, most=_WIDEST)
    kv_heads = stored.whole("num_key_value_heads", heads, most=_WIDEST)
    if heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; mend config.json"
        )
    rope = read_rope(hf)
    fields: dict[str, Any] = {
        "vocab_size": stored.whole("vocab_size", 0, most=_WIDEST),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": _head_dim(stored, hidden // heads, rope),
        "intermediate_size": stored.whole("intermediate_size", 0, most=_WIDEST),
        "norm_eps": stored.number("rms_norm_eps", 1e-6, least=1e-12, most=0.1),
        "max_position": stored.whole("max_position_embeddings", DEFAULT_MAX_POSITION),
        "rope": rope,
        "windows": (None,) * layers,
        "tie_embeddings": stored.flag("tie_word_embeddings", False),
        "dtype": _dtype(stored),
    }
    return DenseDecoder(**{**fields, **options}).model_config()


def read_layer_count(hf: Mapping[str, Any]) -> int:
    """``num_hidden_layers``. Raises ``CheckpointError``: it is missing or no plausible count."""
    layers = StoredFields(hf).whole("num_hidden_layers", None, most=_DEEPEST)
    if layers is None:
        raise CheckpointError("config.json: num_hidden_layers is missing; add it")
    return layers


def read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta`` beside ``rope_scaling``.

    Raises ``CheckpointError``: a field of another type or out of range; ``UnsupportedModelError``: another kind.
    """
    stored = StoredFields(hf)
    scaling = {**stored.nested("rope_scaling").values, **stored.nested("rope_parameters").values}
    rope = StoredFields(scaling, "config.json: rope_scaling")
    for fields in (stored, rope):
        share = fields.number("partial_rotary_factor", 1.0, least=0.0, most=1.0)
        if share != 1.0:
            raise UnsupportedModelError(f"partial_rotary_factor={share:g} is not supported; supported is 1")
    kind = rope.text("rope_type", None) or rope.text("type", None) or "default"
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"rope_type={_word(kind)} is not supported; supported are {', '.join(ROPE_KINDS)}")
    max_position = stored.whole("max_position_embeddings", DEFAULT_MAX_POSITION)
    name = "original_max_position_embeddings"
    own = kind in ("llama3", "yarn")
    original = (stored.whole(name, None) or rope.whole(name, None)) if own else None
    ranges = {
        "low_freq_factor": (1e-3, 1e3),
        "high_freq_factor": (1e-3, 1e3),
        "beta_fast": (1e-3, 1e6),
        "beta_slow": (1e-3, 1e6),
        "mscale": (0.0, 1e3),
        "mscale_all_dim": (0.0, 1e3),
    }
    known = {name: rope.number(name, None, least=least, most=most) for name, (least, most) in ranges.items()}
    found = RopeConfig(
        theta=_theta(stored, rope),
        kind=kind,
        factor=rope.number("factor", max_position / (original or max_position), least=1e-3, most=1e6),
        original_length=original or max_position,
        attention_factor=rope.number("attention_factor", None, least=1e-3, most=1e3),
        truncate=rope.flag("truncate", True),
        **{name: value for name, value in known.items() if value is not None},
    )
    if not found.low_freq_factor < found.high_freq_factor:
        raise rope.fault("high_freq_factor", f"must be more than low_freq_factor={found.low_freq_factor:g}")
    return found


def _theta(stored: StoredFields, rope: StoredFields) -> float:
    """The base; longest known contexts have 5e10."""
    beside = stored.number("rope_theta", 10000.0, least=2.0, most=1e12)
    return rope.number("rope_theta", beside, least=2.0, most=1e12)


def _head_dim(stored: StoredFields, default: int, rope: RopeConfig) -> int:
    """Rotary embeddings turn pairs, so it is even; dynamic NTK divides by ``head_dim - 2``."""
    size = stored.whole("head_dim", default, most=_WIDEST)
    least = 4 if rope.kind == "dynamic" else 2
    if size < least or size % 2:
        raise CheckpointError(f"config.json: head_dim={size} must be even and at least {least}; correct it")
    return size


def _dtype(stored: StoredFields) -> str:
    """The type to hold the weights in; float64 is held as float32."""
    for name in ("dtype", "torch_dtype"):
        named = stored.text(name, None)
        if named is not None:
            fields = StoredFields({name: named.removeprefix("torch.")}, stored.file)
            return fields.text(name, "", choices=(*_DTYPES, "float64")).replace("64", "32")
    return "float32"


def _check_activation(stored: StoredFields) -> None:
    name = stored.text("hidden_act", None) or "silu"
    if name not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act={_word(name)} is not supported; supported is silu")


def _word(name: str) -> str:
    return name if name.isidentifier() and len(name) < 60 else shown(name)
