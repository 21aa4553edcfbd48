"""How many blocks there are, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device import kv_cache
from jaxdeploy.engine.device.kv_cache import MAX_CPU_BYTES, CachePlan, allocate_pools, plan_cache
from jaxdeploy.errors import CacheTooSmallError
from jaxdeploy.models.cache_layout import CacheDtype
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import cache_layouts
from jaxdeploy.parallel.mesh import make_mesh
from pallas_kernels.kv_pool import QuantizedPool, fits, pool_bits
from tests.tiny_models import CONFIG, attention_of, changed

BLOCK_BYTES = 2 * 2 * 4 * 8 * 16 * 4
"""Keys and values · layers · KV heads · head dim · tokens in a block · bytes of a float32."""


def plan(
    model: ModelConfig = CONFIG,
    *,
    tp: int = 1,
    session_len: int = 100,
    batch: int = 3,
    dtype: Any = jnp.float32,
    bits: int | None = None,
    **kw: Any,
) -> CachePlan:
    config = EngineConfig(**{"block_size": 16, **kw})
    stored = CacheDtype(jnp.dtype(dtype), bits)
    return plan_cache(
        cache_layouts(model), config, make_mesh(tp), session_len=session_len, max_batch_size=batch, dtype=stored
    )


def allocate(made: CachePlan, tp: int, ranges: Any = None) -> tuple[Any, ...]:
    dtype = CacheDtype(jnp.dtype(jnp.bfloat16), made.bits)
    return allocate_pools(cache_layouts(CONFIG), made, make_mesh(tp), dtype, ranges)


def test_on_cpu_every_sequence_can_be_full() -> None:
    made = plan()
    assert (made.num_blocks, made.block_size, made.block_bytes) == (3 * 7, 16, BLOCK_BYTES)
    assert "max_batch_size x session_len = 21 blocks, at most 1024.00 MiB on CPU" in made.reason


def test_on_cpu_one_gib_is_the_limit() -> None:
    large = changed(CONFIG, num_layers=64, num_heads=32, num_kv_heads=32, head_dim=128, windows=(None,) * 64)
    made = plan(large, session_len=512, batch=8)
    assert made.block_bytes == 2 * 64 * 32 * 128 * 16 * 4
    assert made.num_blocks == MAX_CPU_BYTES // made.block_bytes < 8 * 32


def test_an_explicit_number_of_blocks_wins() -> None:
    made = plan(num_blocks=9, cache_max_entry_count=5000)
    assert (made.num_blocks, made.reason) == (9, "num_blocks, as asked")


def test_a_whole_number_counts_blocks() -> None:
    made = plan(cache_max_entry_count=11)
    assert (made.num_blocks, made.reason) == (11, "cache_max_entry_count, as asked")


def test_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_free_bytes", lambda device: 100 * BLOCK_BYTES)
    assert plan(cache_max_entry_count=0.5).num_blocks == 50
    assert plan(cache_max_entry_count=0.5, tp=4).num_blocks == 200  # a device holds a quarter of each block
    assert "0.5 of 800.00 KiB free after weights" in plan(cache_max_entry_count=0.5).reason


@pytest.mark.parametrize(("dtype", "share"), [(jnp.bfloat16, 2), (jnp.float16, 2), (jnp.float32, 1)])
def test_block_bytes_follow_the_dtype(dtype: Any, share: int) -> None:
    assert plan(dtype=dtype).block_bytes == BLOCK_BYTES // share


def test_a_device_holds_its_heads() -> None:
    assert plan(tp=4).block_bytes == BLOCK_BYTES // 4


def test_too_small_for_one_sequence_shows_the_arithmetic() -> None:
    with pytest.raises(CacheTooSmallError) as caught:
        plan(num_blocks=6)
    text = str(caught.value)
    assert "session_len=100 needs 7 KV blocks of 16 tokens (7 x 8.00 KiB = 56.00 KiB)" in text
    assert "but there are 6 (num_blocks, as asked); lower session_len" in text
    assert "\n" not in text
    assert plan(num_blocks=7).num_blocks == 7


def test_the_plan_reads_as_a_sentence() -> None:
    expected = "KV cache: 7 blocks of 16 tokens = 112 tokens, 8.00 KiB a block, 56.00 KiB in all (num_blocks, as asked)"
    assert str(plan(num_blocks=7)) == expected


LARGE = changed(CONFIG, num_layers=32, num_kv_heads=8, head_dim=128, windows=(None,) * 32)


@pytest.mark.parametrize(("bits", "times"), [(8, 2 * 128 / 132), (4, 2 * 128 / 68)])
@pytest.mark.parametrize("tp", [1, 4])
def test_quantised_blocks_are_more(monkeypatch: pytest.MonkeyPatch, tp: int, bits: int, times: float) -> None:
    """About twice and four times as many as of bfloat16: a scale and a zero go beside a vector."""
    monkeypatch.setattr(kv_cache, "_free_bytes", lambda device: 10 << 30)
    floats, quantised = (plan(LARGE, tp=tp, dtype=jnp.bfloat16, bits=given) for given in (None, bits))
    assert quantised.num_blocks == pytest.approx(times * floats.num_blocks, rel=1e-3)
    assert (quantised.bits, floats.bits) == (bits, None)
    assert str(quantised).startswith(f"int{bits} KV cache: {quantised.num_blocks} blocks of 16 tokens")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tp", [1, 4])
def test_quantised_pools_take_the_bytes_that_were_planned(tp: int, bits: int) -> None:
    made = plan(tp=tp, num_blocks=7, bits=bits)
    pools = allocate(made, tp)
    assert all(fits(pool, attention_of(CONFIG).num_heads, attention_of(CONFIG).head_dim) for pool in pools)
    assert {pool_bits(pool, attention_of(CONFIG).head_dim) for pool in pools} == {bits}
    for pool in pools:
        assert isinstance(pool, QuantizedPool)
        assert not pool.values.any()
        np.testing.assert_array_equal(pool.scales, np.broadcast_to([[1], [0]], pool.scales.shape))
    arrays = jax.tree.leaves(pools)
    on_one = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards if shard.device.id == 0)
    assert on_one == made.num_blocks * made.block_bytes


@pytest.mark.parametrize("tp", [1, 4])
def test_calibrated_pools_hold_their_layers_ranges(tp: int) -> None:
    ranges = np.arange(CONFIG.num_layers * 2 * 4 * 2, dtype=np.float16).reshape(CONFIG.num_layers, 2, 4, 2)
    made = plan(tp=tp, num_blocks=7, bits=8)
    pools = allocate(made, tp, ranges)
    for pool, layer in zip(pools, ranges, strict=True):
        assert isinstance(pool, QuantizedPool)
        assert pool.calibrated
        assert fits(pool, attention_of(CONFIG).num_heads, attention_of(CONFIG).head_dim)
        np.testing.assert_array_equal(pool.scales, np.broadcast_to(layer[None, ..., None], pool.scales.shape))
        assert {shard.data.shape for shard in pool.scales.addressable_shards} == {(7, 2, 4 // tp, 2, 16)}


@pytest.mark.parametrize("tp", [1, 4])
def test_pools_are_zero_and_cut_along_kv_heads(tp: int) -> None:
    pools = jax.tree.leaves(allocate(plan(tp=tp, num_blocks=7), tp))
    assert [pool.shape for pool in pools] == [(7, 2, 4, 16, 8)] * CONFIG.num_layers
    assert not any(pool.any() for pool in pools)
    assert {shard.data.shape for pool in pools for shard in pool.addressable_shards} == {(7, 2, 4 // tp, 16, 8)}
    assert {pool.dtype for pool in pools} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("config", "kilobytes", "host_blocks"),
    [
        ({}, 4 * BLOCK_BYTES * 10 // 1024, 10),
        ({}, 10**9, 4 * 6),
        ({"num_cpu_blocks": 7}, 10**9, 7),
        ({"num_cpu_blocks": 0}, 10**9, 0),
        ({"enable_prefix_caching": False}, 10**9, 0),
    ],
)
def test_blocks_on_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any], kilobytes: int, host_blocks: int
) -> None:
    """A quarter of what is free there, at most four times what the device has; none on a CPU unless asked for."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:       9999999999 kB\nMemAvailable:   {kilobytes} kB\n")
    monkeypatch.setattr(kv_cache, "MEMINFO", meminfo)
    assert plan(num_blocks=6, session_len=90, **config).host_blocks == config.get("num_cpu_blocks", 0)
    monkeypatch.setattr(kv_cache, "on_cpu", lambda mesh: False)
    made = plan(num_blocks=6, session_len=90, tp=2, **config)
    assert (made.host_blocks, made.host_block_bytes) == (host_blocks, BLOCK_BYTES)
    assert ("more on the host" in str(made)) == (host_blocks > 0)
    meminfo.unlink()
    assert plan(num_blocks=6, session_len=90, **config).host_blocks == config.get("num_cpu_blocks", 0)
