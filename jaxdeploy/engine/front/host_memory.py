"""Whether it pays to keep evicted KV blocks in host memory."""

from __future__ import annotations

import logging
from typing import Protocol

from jaxdeploy.engine.device.buckets import StepShape

logger = logging.getLogger("jaxdeploy")


class Timed(Protocol):
    """The measurements of a runner."""

    def seconds_to_compute(self, shape: StepShape) -> float:
        """Return the seconds per prompt token in a step of ``shape``."""
        ...

    def seconds_to_restore(self) -> float:
        """Return the seconds to copy one block from host memory."""
        ...


def restoring_pays(runner: Timed, shapes: list[StepShape], block_size: int) -> bool:
    """Measure whether a KV block is copied back from host memory faster than it is computed again."""
    largest = max(shapes, key=lambda shape: (shape.prefill_tokens, -shape.decodes))
    compute = runner.seconds_to_compute(largest) * block_size
    restore = runner.seconds_to_restore()
    logger.info(
        "a KV block comes back from host memory in %.3f ms, and is computed in %.3f ms", 1e3 * restore, 1e3 * compute
    )
    if restore > compute:
        logger.warning("num_cpu_blocks: host memory is not used, evicted blocks are computed again faster")
    return restore <= compute
