"""Weights as a step's arguments: fewer arrays, the same decoder again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdeploy.engine.device.step_weights import flatten
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.unstack import unstack, unstack_in_one_launch
from tests.tiny_models import CONFIG


def different_everywhere(decoder: Decoder) -> Decoder:
    """No two of its parameters are equal, as norms that begin as ones would be."""
    state = nnx.state(decoder)
    leaves, tree = jax.tree.flatten(state)
    drawn = [jax.random.normal(jax.random.key(index), leaf.shape, leaf.dtype) for index, leaf in enumerate(leaves)]
    nnx.update(decoder, jax.tree.unflatten(tree, drawn))
    return decoder


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_gets_one_array_for_all_norms_and_makes_the_same_decoder_of_it(devices: int) -> None:
    decoder = different_everywhere(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    before = jax.tree.leaves(nnx.state(decoder))
    weights, arrays = flatten(decoder, make_mesh(devices))
    norms = 2 * CONFIG.num_layers + 1
    assert len(arrays) == len(before) - norms + 1
    assert arrays[0].shape == (norms, CONFIG.hidden_size)
    after = jax.jit(lambda arrays: jax.tree.leaves(nnx.state(weights.model(arrays))))(arrays)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_shapes_are_flattened_like_arrays() -> None:
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    weights, arrays = flatten(decoder, make_mesh(1))
    same, shapes = flatten(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))), make_mesh(1))
    assert same.stacks == weights.stacks
    assert [(shape.shape, shape.dtype) for shape in shapes] == [(array.shape, array.dtype) for array in arrays]


@pytest.mark.parametrize(("count", "width"), [(1, 8), (5, 77), (3, 2500)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_unstack_gives_every_row(count: int, width: int, dtype: jnp.dtype) -> None:
    rows = jax.random.normal(jax.random.key(0), (count, width), dtype)
    for out in (unstack(rows), unstack_in_one_launch(rows)):
        assert len(out) == count
        for row, array in zip(rows, out, strict=True):
            np.testing.assert_array_equal(row, array)
