"""What ``quant_policy`` means for a model and its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdeploy.checkpoint.kv_parameters import read_kv_parameters
from jaxdeploy.config import EngineConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.config import ModelConfig

logger = logging.getLogger("jaxdeploy")

SMALL_HEAD = 64
"""Below it int4 is warned of."""

Ranges = np.ndarray[Any, np.dtype[np.float16]]
"""Scale and zero of the keys and of the values of every layer and KV head: [L, 2, K, 2]."""


class KVPolicy(NamedTuple):
    """``bits`` of the KV cache's elements, ``None`` for floats; ``ranges``, ``None`` where each vector has its own."""

    bits: int | None
    ranges: Ranges | None = None


def kv_policy(folder: Path, model: ModelConfig, config: EngineConfig) -> KVPolicy:
    """Read ``config.quant_policy``, saying in the log what may surprise.

    4 is int8 with calibrated ranges where ``folder`` holds LMDeploy v0.3's KV parameters, and else int4.

    Raises:
        ConfigError: vectors that bits do not fill up bytes with.
        CheckpointError: KV parameters that do not fit the model.
    """
    bits = config.quant_policy or None
    if bits and model.head_dim % 2:
        raise ConfigError(f"quant_policy={bits} needs an even head_dim, not {model.head_dim}; leave it out")
    if bits != 4:
        return KVPolicy(bits)
    parameters = read_kv_parameters(folder, model.num_layers, model.num_kv_heads)
    if parameters is not None:
        logger.warning(
            "quant_policy=4: KV parameters of LMDeploy v0.3 are there, where 4 meant int8; the KV cache is int8 with "
            "their calibrated ranges"
        )
        return KVPolicy(8, as_ranges(parameters))
    logger.warning("quant_policy=4 is int4, as in LMDeploy since v0.4; in v0.3 it meant int8, which is 8")
    if reasons := _reasons_against_int4(model):
        logger.warning("quant_policy=4 may cost much quality here: %s; 8 is safer", ", and ".join(reasons))
    return KVPolicy(4)


def as_ranges(parameters: np.ndarray[Any, np.dtype[np.float32]]) -> Ranges:
    """``parameters`` [L, K, 4] are for integers from −128 on; those of a ``QuantizedPool`` start at 0.

    Zeros go by the scales after their rounding, which then moves both ends of a range alike, and its middle not at all.
    """
    scales = parameters[..., 0::2].astype(np.float16)
    zeros = (parameters[..., 1::2] - 128 * scales.astype(np.float32)).astype(np.float16)
    return np.moveaxis(np.stack([scales, zeros], axis=-1), 2, 1)


def _reasons_against_int4(model: ModelConfig) -> list[str]:
    reasons = []
    if model.qkv_bias:
        reasons.append("biased keys have a few channels far from the others (known of Qwen2.5)")
    if model.head_dim < SMALL_HEAD:
        reasons.append(f"head_dim={model.head_dim} is below {SMALL_HEAD}")
    return reasons
