"""What ``quant_policy`` means for a model and its folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdeploy.checkpoint.kv_parameters import read_kv_parameters
from jaxdeploy.config import EngineConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.cache_layout import CacheLayout

logger = logging.getLogger("jaxdeploy")

BIASED_KEYS = "biased keys have a few channels far from the others (known of Qwen2.5)"


class KVPolicy(NamedTuple):
    """How the KV cache is quantised.

    Attributes:
        bits: bits of an element, ``None`` for floats.
        ranges: calibrated ranges of each layer, ``None`` if each vector is quantised by its own range.
    """

    bits: int | None
    ranges: tuple[Any, ...] | None = None


def kv_policy(
    folder: Path, layouts: Sequence[CacheLayout], config: EngineConfig, *, biased_keys: bool = False
) -> KVPolicy:
    """Return the policy of ``config.quant_policy``, with a warning in the log if it may surprise.

    4 is int8 with calibrated ranges if ``folder`` holds KV parameters of LMDeploy v0.3, and int4 otherwise.

    Raises:
        ConfigError: the layout of a layer has no form of these bits.
        CheckpointError: the KV parameters do not fit the model.
    """
    bits = config.quant_policy or None
    if bits is None:
        return KVPolicy(None)
    if refusals := _distinct(layout.refusal(bits) for layout in layouts):
        raise ConfigError(f"quant_policy={bits} {refusals[0]}; leave it out")
    if bits != 4:
        return KVPolicy(bits)
    ranges = read_kv_parameters(folder, layouts)
    if ranges is not None:
        logger.warning(
            "quant_policy=4: KV parameters of LMDeploy v0.3 are there, where 4 meant int8; the KV cache is int8 with "
            "their calibrated ranges"
        )
        return KVPolicy(8, ranges)
    logger.warning("quant_policy=4 is int4, as in LMDeploy since v0.4; in v0.3 it meant int8, which is 8")
    biased = BIASED_KEYS if biased_keys else None
    if risks := _distinct([biased, *(layout.risk(bits) for layout in layouts)]):
        logger.warning("quant_policy=4 may cost much quality here: %s; 8 is safer", ", and ".join(risks))
    return KVPolicy(4)


def _distinct(reasons: Iterable[str | None]) -> list[str]:
    """Return the reasons that were given, each one once."""
    return list(dict.fromkeys(reason for reason in reasons if reason is not None))
