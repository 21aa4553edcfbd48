"""What the Mosaic GPU backends share: where they run, and in ``ring`` how their warpgroups hand data to each other.

This module can be imported anywhere. ``ring`` and the kernels import ``jax.experimental.pallas.mosaic_gpu``, which not
every jax in our range can do: backends import them once they have accepted a call.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import RefusalError, need_gpu
from pallas_kernels.target import Target

MIN_JAX = (0, 11, 2)
"""First release with the API that the kernels are written against, and whose interpreter runs them."""

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a CTA can have."""

ATOM = 8
"""Rows that are swizzled together: an array with another number of them cannot be copied to swizzled tiles."""


def need_hopper(target: Target) -> None:
    """Raise ``RefusalError`` unless ``target`` is of compute capability 9.0 and jax is new enough."""
    need_gpu(target, (9, 0), (9, 0))
    need_jax()


def need_jax() -> None:
    """Raise ``RefusalError`` where jax is older than the kernels need: for them to be interpreted, too."""
    if jax.__version_info__ < MIN_JAX:
        raise RefusalError(f"needs jax {'.'.join(map(str, MIN_JAX))}, have {jax.__version__}")
