"""Scheduling: which sequences a step contains, and the blocks that they own. Plain Python without arrays."""
