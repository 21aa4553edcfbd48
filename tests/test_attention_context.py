"""The dense and the paged context agree on every position scheme and option of the scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.models.attention import DenseContext, PagedContext, Rows
from jaxdeploy.models.rope import Rotary, rotated
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.score_options import ScoreOptions

TOKENS, KV_HEADS, GROUP, SIZE = 24, 2, 2, 16
PLAIN = ScoreOptions(0.25)
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625], jnp.float32)


def scheme_of(part: int | None) -> Rotary | None:
    """Angles that rotate ``part`` numbers of a head."""
    if part is None:
        return None
    angles = jnp.arange(TOKENS, dtype=jnp.float32)[:, None] * 0.5 ** jnp.arange(part // 2, dtype=jnp.float32)
    return Rotary(jnp.cos(angles), jnp.sin(angles))


@pytest.mark.parametrize(
    ("part", "scores", "tp"),
    [
        (None, ScoreOptions(0.25, window=5, slopes=SLOPES), 1),
        (8, ScoreOptions(0.25, softcap=2.0, sinks=4 * SLOPES), 2),
        (16, PLAIN, 1),
    ],
)
def test_paged_is_dense(part: int | None, scores: ScoreOptions, tp: int) -> None:
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, KV_HEADS, GROUP + 2, SIZE)), jnp.float32)
    table, places = jnp.array([[2, 0]], jnp.int32), jnp.arange(TOKENS)
    rows = Rows(table, jnp.zeros(1, jnp.int32), jnp.full(1, TOKENS, jnp.int32), TOKENS)
    paged = PagedContext((rows,), table[0, places // 16] * 16 + places % 16, make_mesh(tp))
    pool, scheme = jnp.zeros((3, 2, KV_HEADS, 16, SIZE), jnp.float32), scheme_of(part)
    attended, _ = jax.jit(paged.attend)(qkv, scheme, pool, scores)
    expected, _ = jax.jit(DenseContext(1).attend)(qkv, scheme, None, scores)
    np.testing.assert_allclose(attended, expected, rtol=0, atol=1e-5)
    plain, _ = DenseContext(1).attend(qkv, scheme_of(16), None, PLAIN)
    assert (np.abs(expected - plain).max() > 1e-2) == (scores is not PLAIN), "the options matter"


def test_the_rest_of_a_head_is_not_rotated() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, 1, SIZE)), jnp.float32)
    turned = rotated(x, scheme_of(8))
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(turned[..., :8], rotated(x[..., :8], scheme_of(8)))
    assert np.abs(turned - x)[1:, :, :8].max() > 0.1
