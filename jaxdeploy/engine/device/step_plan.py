"""How steps are executed, decided once when an engine is built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.models import fused_decode
from jaxdeploy.models.model import Hidden, Model

logger = logging.getLogger("jaxdeploy")


@dataclass(frozen=True)
class StepPlan:
    """Which steps run through the fused decode kernels. All others run op by op.

    Attributes:
        mesh: the devices that run the steps.
        fused_decodes: sizes of decode steps, in sequences, that are fused.
    """

    mesh: Mesh
    fused_decodes: frozenset[int] = frozenset()

    def is_fused(self, shape: StepShape) -> bool:
        """Return whether steps of ``shape`` run through the fused kernels."""
        return shape.decodes in self.fused_decodes and _may_fuse(shape)

    def forward(self, model: Model, shape: StepShape) -> Callable[..., Hidden]:
        """Return the function that runs the layers in a step of ``shape``; it is called like ``Model.hidden``."""
        return partial(fused_decode.decode_hidden, model) if self.is_fused(shape) else model.hidden


def plan_steps(model: Model, mesh: Mesh, pools: Sequence[Any], shapes: Iterable[StepShape]) -> StepPlan:
    """Choose how steps of ``shapes`` are executed, and log the reasons.

    The devices, the layers of ``model``, its dtype and sizes and its ``pools`` decide. Arrays may be abstract.
    """
    reason = fused_decode.refusal_of(model)
    if reason:
        logger.info("decode steps run op by op: %s", reason)
        return StepPlan(mesh)
    fused, table_lengths = [], {shape.decodes: shape.table_length for shape in shapes if _may_fuse(shape)}
    for decodes, table_length in sorted(table_lengths.items()):
        reason = fused_decode.refusal_of_call(model, mesh, pools, decodes, table_length)
        if reason is None:
            fused.append(decodes)
        else:
            logger.info("decode steps of %d sequences run op by op: %s", decodes, reason)
    if fused:
        logger.info("decode steps of %s sequences run through fused kernels", ", ".join(map(str, fused)))
    return StepPlan(mesh, frozenset(fused))


def _may_fuse(shape: StepShape) -> bool:
    """Return whether each sequence of a step has a single token and no adapter."""
    return bool(shape.decodes) and not (shape.prefill_tokens or shape.drafts or shape.adapted)
