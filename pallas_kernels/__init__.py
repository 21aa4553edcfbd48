"""GPU kernels in Pallas, each op with a plain XLA reference. Depends on jax only; usable on its own."""

from __future__ import annotations

from pallas_kernels.dispatch import BackendStatus, backend_report

__all__ = ["BackendStatus", "backend_report"]
