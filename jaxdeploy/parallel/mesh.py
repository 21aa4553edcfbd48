"""The device mesh of an engine."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdeploy.errors import ConfigError

TP_AXIS = "tp"


def make_mesh(tp: int) -> Mesh:
    """A mesh over the first ``tp`` devices. Raises ``ConfigError`` if there are fewer."""
    devices = jax.devices()
    if not 1 <= tp <= len(devices):
        raise ConfigError(f"tp={tp} must be between 1 and the {len(devices)} devices of this machine; choose fewer")
    return Mesh(np.array(devices[:tp]), (TP_AXIS,))


def on_cpu(mesh: Mesh) -> bool:
    """Return whether the devices are CPUs, whose memory is that of the host."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def axis_size(mesh: Mesh, axis: str | None) -> int:
    """Return the number of devices along the mesh axis ``axis``; 1 for ``None`` and for an axis that ``mesh`` lacks."""
    return 1 if axis is None else mesh.shape.get(axis, 1)
