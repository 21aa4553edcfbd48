"""Models whose linear maps are stored quantised, written here from the descriptions of the layouts.

The truth is a float decoder of the same weights: ``(q - zero) · scale``, or ``q · scale``, computed here.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxdeploy.checkpoint.model import LoadOptions, load_model
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.models.decoder import Decoder, decoder_from
from jaxdeploy.models.quantized import Int4Weight, Int8Weight
from jaxdeploy.models.registry import family_of, read_config
from jaxdeploy.models.weights import ParamPath
from jaxdeploy.parallel.mesh import make_mesh
from tests.tiny_models import VOCAB

Array = np.ndarray[Any, Any]

TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 24), np.int32)
LINEARS = ("wqkv", "wo", "gate_up", "down")


def hf_of(architecture: str, **sizes: int) -> dict[str, Any]:
    """A ``config.json``; every width a multiple of 128 unless ``sizes`` say otherwise."""
    plain = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "max_position_embeddings": 256,
    }
    return {"architectures": [architecture], **plain, **sizes}


LLAMA = hf_of("LlamaForCausalLM")
NARROW = hf_of("LlamaForCausalLM", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=192)
SHARED = hf_of("LlamaForCausalLM", num_hidden_layers=1, num_key_value_heads=4, head_dim=128, intermediate_size=512)
"""For four devices."""


@dataclass(frozen=True)
class Integers:
    """``q`` [N, K], ``zeros`` and ``scales`` [N, G], the group of each input [K]."""

    q: Array
    zeros: Array
    scales: Array
    groups: Array

    def value(self) -> Array:
        """The weight, float32 [N, K]."""
        steps = self.q.astype(np.float32) - self.zeros.astype(np.float32)[:, self.groups]
        return np.asarray(steps * self.scales.astype(np.float32)[:, self.groups])


@dataclass(frozen=True)
class Layout:
    """``config`` as it is in ``config.json``, and what ``store`` makes of a module.

    ``inputs`` says which inputs share scales: "in order", "scattered" the same way for all modules of a linear map, or
    "scattered apart". ``group`` is how many of them, ``None`` for all.
    """

    config: Mapping[str, Any]
    store: Callable[[Integers], dict[str, Array]]
    group: int | None = 64
    bits: int = 4
    symmetric: bool = False
    inputs: str = "in order"
    scale_dtype: Any = np.float16


def words(values: Array, bits: int = 4) -> Array:
    """Rows of integers as one row of bits each, the first value lowest: int32 [..., K · bits / 32]."""
    planes = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(*values.shape[:-1], -1), axis=-1, bitorder="little").view(np.int32)


def store_awq(w: Integers) -> dict[str, Array]:
    def along_outputs(values: Array) -> Array:
        eights = values.T.reshape(values.shape[1], -1, 8)
        return words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape[1], -1))

    return {"qweight": along_outputs(w.q), "qzeros": along_outputs(w.zeros), "scales": w.scales.T}


def store_gptq(w: Integers, bits: int = 4, minus: int = 1) -> dict[str, Array]:
    zeros = w.zeros.T - np.uint8(minus)
    return {"qweight": words(w.q, bits).T, "qzeros": words(zeros, bits), "scales": w.scales.T, "g_idx": w.groups}


def store_packed(w: Integers) -> dict[str, Array]:
    shape = np.array(w.q.shape, np.int64)
    scattered = {"weight_g_idx": w.groups} if (np.diff(w.groups) < 0).any() else {}
    return {"weight_packed": words(w.q), "weight_scale": w.scales, "weight_shape": shape, **scattered}


def store_packed_with_zeros(w: Integers) -> dict[str, Array]:
    return {**store_packed(w), "weight_zero_point": words(w.zeros.T).T}


def store_int8(w: Integers, scale: str) -> dict[str, Array]:
    return {"weight": (w.q.astype(np.int16) - 128).astype(np.int8), scale: w.scales}


def awq_config(group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True, **more}


def gptq_config(group: int, bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": False, **more}


def compressed_config(form: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


PACKED = functools.partial(compressed_config, "pack-quantized", num_bits=4)
AWQ = Layout(awq_config(64), store_awq)
GPTQ = Layout(gptq_config(64), store_gptq)
SCATTERED = replace(GPTQ, config=gptq_config(64, desc_act=True), inputs="scattered")
LAYOUTS = {
    "awq": AWQ,
    "awq, one group": Layout(awq_config(-1), store_awq, group=None),
    "gptq": GPTQ,
    "gptq_v2, 3 bits": Layout(
        gptq_config(64, 3, checkpoint_format="gptq_v2"), functools.partial(store_gptq, bits=3, minus=0), bits=3
    ),
    "gptq, act-order": SCATTERED,
    "compressed-tensors": Layout(PACKED(symmetric=True, strategy="group", group_size=64), store_packed, symmetric=True),
    "compressed-tensors, zero points": Layout(
        PACKED(symmetric=False, strategy="group", group_size=64),
        store_packed_with_zeros,
        scale_dtype=ml_dtypes.bfloat16,
    ),
    "compressed-tensors, channels": Layout(
        PACKED(symmetric=False, strategy="channel", group_size=None), store_packed_with_zeros, group=None
    ),
    "compressed-tensors, act-order": Layout(
        PACKED(symmetric=True, strategy="group", group_size=64, actorder="group"),
        store_packed,
        symmetric=True,
        inputs="scattered",
    ),
}
SMOOTH_QUANT = Layout(
    {"quant_method": "smooth_quant", "quant_dtype": "int8"},
    functools.partial(store_int8, scale="scale"),
    group=None,
    bits=8,
    symmetric=True,
    scale_dtype=np.float32,
)
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8_LAYOUTS = {
    "smooth_quant": SMOOTH_QUANT,
    "compressed-tensors": replace(
        SMOOTH_QUANT,
        config=compressed_config("int-quantized", BY_TOKEN, num_bits=8, symmetric=True, strategy="channel"),
        store=functools.partial(store_int8, scale="weight_scale"),
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model: ``tensors`` as they are stored, ``values`` in floats by the names they would have as such."""

    hf: dict[str, Any]
    tensors: dict[str, Array] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)

    def load(self, folder: Path, *, tp: int = 1, **options: Any) -> Decoder:
        """Write and read it."""
        self.write(folder)
        dtype = options.pop("dtype", jnp.dtype(jnp.float32))
        model = options.pop("model", None)
        return load_model(folder, read_hf_config(folder), make_mesh(tp), LoadOptions(dtype, **options), model)

    def write(self, folder: Path) -> None:
        """Write ``config.json`` and the tensors."""
        put_json(folder / "config.json", self.hf)
        put_tensors(folder / "model.safetensors", self.tensors)

    def floats(self) -> Decoder:
        """The decoder of the float weights."""
        table = family_of(self.hf).weights(read_config(self.hf))
        arrays = {path: source.assemble([self.values[n] for n in source.names]) for path, source in table.items()}
        return decoder_from(read_config(self.hf), {path: jnp.asarray(array) for path, array in arrays.items()})

    def without(self, *names: str) -> Checkpoint:
        """Less some stored tensors."""
        return replace(self, tensors={name: array for name, array in self.tensors.items() if name not in names})


def checkpoint(
    layout: Layout, hf: Mapping[str, Any] = LLAMA, keep: Sequence[str] = ("lm_head", "output")
) -> Checkpoint:
    """Random weights, those of linear maps stored in ``layout`` but for modules that contain one of ``keep``."""
    made, random = Checkpoint({**hf, "quantization_config": layout.config}), np.random.default_rng(0)
    for path, source in family_of(hf).weights(read_config(hf)).items():
        for number, (name, shape) in enumerate(zip(source.names, source.shapes, strict=True)):
            if source.linear is None or any(part in name for part in keep):
                made.tensors[name] = made.values[name] = _floats(random, name, shape)
                continue
            weight = _integers(random, layout, shape, _groups(layout, path, number, shape[1]))
            made.values[name] = weight.value()
            module = name.removesuffix(".weight")
            made.tensors.update({f"{module}.{suffix}": array for suffix, array in layout.store(weight).items()})
    return made


def _floats(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    drawn = random.standard_normal(shape, np.float32)
    width = 1 if "emb" in name else shape[-1]
    return 1 + drawn / np.float32(10) if "norm" in name else drawn / np.sqrt(np.float32(width))


def _groups(layout: Layout, path: ParamPath, number: int, width: int) -> Array:
    """The group of each input of the ``number``-th module of a linear map."""
    inputs = np.arange(width)
    if layout.inputs != "in order":
        salt = number if layout.inputs == "scattered apart" else 0
        inputs = np.random.default_rng([zlib.crc32(str(path).encode()), salt]).permutation(width)
    return (inputs // (layout.group or width)).astype(np.int32)


def _integers(random: np.random.Generator, layout: Layout, shape: tuple[int, ...], groups: Array) -> Integers:
    """Worth about as much as a float weight [N, K] of that ``shape``."""
    per_group, middle = (shape[0], int(groups.max()) + 1), 1 << (layout.bits - 1)
    off = 0 if layout.symmetric else max(1, middle // 3)
    zeros = random.integers(middle - off, middle + off + 1, per_group).astype(np.uint8)
    scales = random.uniform(0.5, 1.5, per_group) / (0.6 * middle * np.sqrt(shape[1]))
    q = random.integers(1, 1 << layout.bits, shape).astype(np.uint8)
    return Integers(q, zeros, scales.astype(layout.scale_dtype), groups)


def logits(decoder: Decoder) -> Array:
    """Of some tokens, float64 [B, T, V]."""
    return np.asarray(decoder(jnp.asarray(TOKENS)), np.float64)


def apart(a: Array, b: Array) -> float:
    """Largest difference, relative to the largest magnitude."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def kinds(decoder: Decoder) -> list[list[str]]:
    """What each linear map of each layer is held as, in the order of ``LINEARS``."""
    names: dict[type, str] = {Int4Weight: "int4", Int8Weight: "int8"}
    return [
        [names.get(type(weight), "float") for weight in weights_of(decoder, index)]
        for index in range(len(decoder.layers))
    ]


def weights_of(decoder: Decoder, index: int = 0) -> list[Any]:
    """Those of the linear maps of a layer, in the order of ``LINEARS``."""
    layer = decoder.layers[index]
    return [layer.attention.wqkv, layer.attention.wo, layer.mlp.gate_up, layer.mlp.down]


SUMMED_APART = 1e-5
"""Two orders of summation in float32, over two layers."""
