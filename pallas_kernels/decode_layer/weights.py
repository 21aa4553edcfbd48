"""The weights of one layer as its decode step takes them."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pallas_kernels.w4a16_matmul.layout import input_size, is_packed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerWeights:
    """One pre-norm transformer layer without its first norm, which the layer before has applied.

    A weight is an array [rows, columns] of the activations' dtype, or int32 [rows / 128, 16 + 128/g, columns] in the
    packed form of ``w4a16_matmul``. Biases and norm have the activations' dtype. Under tensor parallelism every array
    is the device's share: whole KV heads, and of gate and up the same columns.

    Attributes:
        wqkv: [D, K · (N/K + 2) · H]; a KV head has the columns of its query heads, then of its key, then of its value.
        wo: [N · H, D].
        gate_up: [D, 2 · F]; the columns of the gate, then those of up.
        down: [F, D].
        mlp_norm: [D], scale of the norm between attention and MLP.
        bqkv: [K · (N/K + 2) · H] or ``None``, and so on for each weight.
    """

    wqkv: jax.Array
    wo: jax.Array
    gate_up: jax.Array
    down: jax.Array
    mlp_norm: jax.Array
    bqkv: jax.Array | None = None
    bo: jax.Array | None = None
    gate_up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


def weight_shape(weight: jax.Array) -> tuple[int, int]:
    """(rows, columns) of the matrix that ``weight`` stands for."""
    rows = input_size(weight.shape) if is_packed(weight) else weight.shape[0]
    return int(rows), int(weight.shape[-1])
