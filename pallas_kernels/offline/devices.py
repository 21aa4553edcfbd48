"""GPUs that need not be there: what XLA's compiler has to know about each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from pallas_kernels.target import Target

KIB, GIB = 2**10, 2**30


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU from its data sheet. ``bandwidth`` is bytes/s; shared memory, L2 and memory are bytes."""

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_memory_per_block: int
    shared_memory_per_core: int
    l2: int
    bandwidth: int
    threads_per_core: int
    memory: int

    @property
    def arch(self) -> str:
        """The name that ``ptxas`` gives it, with the features of just this generation."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")

    @property
    def target(self) -> Target:
        """What kernels are chosen and tuned for on it."""
        return Target("gpu", self.kind, self.capability, self.cores)


DEVICES = {
    "a100": DeviceSpec(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * KIB, 164 * KIB, 40 * KIB**2, 2039 * 10**9, 2048, 80 * GIB
    ),
    "rtx4090": DeviceSpec(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 99 * KIB, 100 * KIB, 72 * KIB**2, 1008 * 10**9, 1536, 24 * GIB
    ),
    "h200": DeviceSpec("NVIDIA H200", (9, 0), 132, 227 * KIB, 228 * KIB, 50 * KIB**2, 4800 * 10**9, 2048, 141 * GIB),
    "b200": DeviceSpec("NVIDIA B200", (10, 0), 148, 227 * KIB, 228 * KIB, 126 * KIB**2, 8000 * 10**9, 2048, 178 * GIB),
}
"""Short name → device, for ``compile_for``."""

# Without versions XLA takes the driver for 0.0 and keeps most commands out of CUDA graphs; without NVLink it has no
# collective kernels.
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {spec.shared_memory_per_core} threads_per_core_limit: {spec.threads_per_core}
  core_count: {spec.cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {spec.bandwidth} l2_cache_size: {spec.l2} clock_rate_ghz: 1.98
  device_memory_size: {spec.memory} shared_memory_per_block_optin: {spec.shared_memory_per_block}
  cuda_compute_capability {{ major: {spec.capability[0]} minor: {spec.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  {interconnect}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{spec.kind}"
"""
_NVLINK = 'device_interconnect_info { active_links: 18 cluster_uuid: "x" clique_id: "0" }'


@cache
def offline_devices(name: str, count: int = 1) -> tuple[Any, ...]:
    """``count`` devices of one process, known to the compiler only. Raises ``ValueError`` for an unknown ``name``."""
    if name not in DEVICES:
        raise ValueError(f"device={name} is not known; choose from {', '.join(DEVICES)}")
    spec = DEVICES[name]
    config = _CONFIG.format(spec=spec, interconnect=_NVLINK if count > 1 else "")
    topology = topologies.get_topology_desc(spec.kind, platform="cuda", target_config=config, topology=f"1x1x{count}")
    return tuple(topology.devices)


def offline_mesh(name: str, count: int, axis: str = "tp") -> Mesh:
    """A mesh of ``count`` such devices along ``axis``."""
    devices: list[jax.Device] = list(offline_devices(name, count))
    return Mesh(np.array(devices), (axis,))
