"""Tensor parallelism: the mesh, and one table from logical axes to mesh axes."""
