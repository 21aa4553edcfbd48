"""The device that a kernel is chosen and tuned for: the one that JAX is about to compile for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Target:
    """``capability`` is CUDA's (major, minor) and ``cores`` the number of multiprocessors; both ``None`` off a GPU."""

    platform: str
    kind: str
    capability: tuple[int, int] | None = None
    cores: int | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether this is an NVIDIA GPU."""
        return self.capability is not None

    @property
    def interpret(self) -> bool:
        """Whether Pallas kernels are interpreted here: off a GPU they cannot be compiled."""
        return not self.is_gpu

    def __str__(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else self.platform


def current_target() -> Target:
    """The target of what is being traced: ``jax.default_device`` if one is set, else the first device.

    A device that only the compiler knows (``pallas_kernels.offline``) counts as what it stands for.
    """
    config: Any = jax.config
    device = config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if device.platform not in ("gpu", "cuda"):
        return Target(device.platform, device.device_kind)
    major, minor = str(device.compute_capability).split(".")
    return Target("gpu", device.device_kind, (int(major), int(minor)), getattr(device, "core_count", None))
