"""What a layer keeps in the cache: the arrays of its pool, their bytes, and their quantised forms.

A pool is a pytree of arrays. The first axis of each array counts blocks. Nothing else about the
arrays is known outside the layout, the attention that uses it, and the kernels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.parallel.sharding import sharding_of
from pallas_kernels import kv_pool
from pallas_kernels.kv_pool import QuantizedPool

Array = np.ndarray[Any, Any]

SMALL_HEAD = 64
"""Vectors shorter than this lose much quality at 4 bits."""

UNIT_RANGE = np.array([[1], [0]], np.float16)
"""Scale and zero of a token that was never written, [2, 1]. Kernels divide by the scale."""


@dataclass(frozen=True)
class CacheDtype:
    """How the cache stores an element.

    Attributes:
        dtype: dtype of floats.
        bits: 8 or 4 for unsigned integers with scales; ``None`` for floats.
    """

    dtype: jnp.dtype
    bits: int | None = None


@dataclass(frozen=True, eq=False)
class PoolArray:
    """One array of a pool.

    Attributes:
        shape: sizes; the first is the number of blocks.
        dtype: dtype of the array.
        axes: logical axis of each dimension, ``None`` for a dimension that is never sharded.
        fill: initial content, broadcast to ``shape``.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    fill: Any = 0

    def nbytes(self, mesh: Mesh | None = None) -> int:
        """Return the bytes on each device of ``mesh``, or those of the whole array."""
        shape = self.shape if mesh is None else sharding_of(mesh, self.axes, self.shape).shard_shape(self.shape)
        return math.prod(shape) * self.dtype.itemsize


class CacheLayout(Protocol):
    """The geometry of one layer's cache. A kind of layer that keeps something else subclasses it.

    Layouts are immutable and hashable, because they are static attributes of modules.
    """

    @abstractmethod
    def pool(self, num_blocks: int, block_size: int, dtype: CacheDtype, ranges: Any = None) -> Any:
        """Return a pool of ``num_blocks`` blocks of ``block_size`` tokens, with a ``PoolArray`` for each array.

        ``ranges`` is a result of ``self.ranges``: the pool is then calibrated.
        """
        ...

    @abstractmethod
    def block_size(self, pool: Any) -> int:
        """Return the number of tokens in a block of ``pool``."""
        ...

    def cleared(self, pool: Any, blocks: jax.Array) -> Any:
        """Return ``pool`` with zeros in ``blocks``, int32 [B]. Blocks beyond the pool are ignored."""
        return jax.tree.map(lambda array: array.at[blocks].set(0, mode="drop"), pool)

    def bytes_per_block(self, block_size: int, dtype: CacheDtype, mesh: Mesh | None = None) -> int:
        """Return the bytes of a block on each device of ``mesh``, or on all devices together."""
        arrays: list[PoolArray] = jax.tree.leaves(self.pool(1, block_size, dtype))
        return sum(array.nbytes(mesh) for array in arrays)

    def refusal(self, bits: int) -> str | None:
        """Return why there is no form of ``bits``, as the end of a sentence, or ``None`` if there is one."""
        return f"is not available for {type(self).__name__}"

    def risk(self, bits: int) -> str | None:
        """Return why ``bits`` may lose much quality, or ``None``."""
        return None

    def note(self) -> str | None:
        """Return a remark for the memory plan, or ``None``."""
        return None

    def ranges(self, parameters: Array) -> Any:
        """Return the calibrated ranges that ``pool`` takes.

        ``parameters`` float32 [ranks, 4] are scale and zero point of keys, then of values, for int8
        elements from −128 to 127; each rank has an equal share of the heads.

        Raises:
            CheckpointError: this layout has no calibrated ranges, or the ranks do not fit it.
        """
        raise CheckpointError(f"{type(self).__name__} has no calibrated ranges; remove the files")


def num_blocks(pool: Any) -> int:
    """Return the number of blocks in any pool."""
    return int(jax.tree.leaves(pool)[0].shape[0])


@dataclass(frozen=True)
class HeadsLayout(CacheLayout):
    """Keys and values of each KV head: [P, 2, K, S, H], or a ``QuantizedPool``.

    Attributes:
        num_heads: KV heads, K.
        key_dim: elements of a key.
        value_dim: elements of a value. The kernels need ``key_dim``.
        copies: consecutive heads with the same keys and values, for devices that share a stored head.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    copies: int = 1

    AXES: ClassVar[tuple[str | None, ...]] = (None, None, "kv_heads", None, None)
    """Logical axes of every array of the pool."""

    def pool(self, num_blocks: int, block_size: int, dtype: CacheDtype, ranges: Array | None = None) -> Any:
        """See ``CacheLayout``. ``ranges`` is float16 [2, K, 2].

        Raises:
            UnsupportedModelError: keys and values have different sizes.
        """
        if self.key_dim != self.value_dim:
            raise UnsupportedModelError(
                f"key_dim={self.key_dim} must equal value_dim={self.value_dim}: the attention kernels store keys and "
                "values in one array; choose another model"
            )
        vectors = (num_blocks, 2, self.num_heads)
        if dtype.bits is None:
            return PoolArray((*vectors, block_size, self.key_dim), dtype.dtype, self.AXES)
        packed = (*vectors, block_size, self.key_dim * dtype.bits // 8)
        fill = UNIT_RANGE if ranges is None else ranges[None, ..., None]
        values: Any = PoolArray(packed, jnp.dtype(jnp.uint8), self.AXES)
        scales: Any = PoolArray((*vectors, 2, block_size), jnp.dtype(jnp.float16), self.AXES, fill)
        return QuantizedPool(values, scales, calibrated=ranges is not None)

    def block_size(self, pool: kv_pool.Pool) -> int:
        """See ``CacheLayout``."""
        return kv_pool.block_size(pool)

    def cleared(self, pool: Any, blocks: jax.Array) -> Any:
        """See ``CacheLayout``. Scales become 1, unless they are calibrated."""
        if not isinstance(pool, QuantizedPool):
            return super().cleared(pool, blocks)
        values = super().cleared(pool.values, blocks)
        if pool.calibrated:
            return replace(pool, values=values)
        return replace(pool, values=values, scales=pool.scales.at[blocks].set(UNIT_RANGE, mode="drop"))

    def refusal(self, bits: int) -> str | None:
        """See ``CacheLayout``. A byte holds two elements of 4 bits, and halves of a vector are packed together."""
        return f"needs an even head_dim, not {self.key_dim}" if self.key_dim % 2 else None

    def risk(self, bits: int) -> str | None:
        """See ``CacheLayout``."""
        if bits == 4 and self.key_dim < SMALL_HEAD:
            return f"head_dim={self.key_dim} is below {SMALL_HEAD}"
        return None

    def note(self) -> str | None:
        """See ``CacheLayout``."""
        stored = self.num_heads // self.copies
        return f"{stored} KV heads, each on {self.copies} devices" if self.copies > 1 else None

    def ranges(self, parameters: Array) -> Array:
        """Return scale and zero of keys and of values, float16 [2, K, 2]. See ``CacheLayout``.

        Elements of a ``QuantizedPool`` start at 0. The zero point is derived from the rounded scale,
        so that rounding moves both ends of a range alike and leaves its middle in place.
        """
        ranks = len(parameters)
        if self.num_heads % ranks:
            raise CheckpointError(
                f"{ranks} ranks cannot share {self.num_heads} KV heads evenly; calibrate again for one rank"
            )
        heads = np.repeat(parameters, self.num_heads // ranks, axis=0)
        scales = heads[:, 0::2].astype(np.float16)
        zeros = (heads[:, 1::2] - 128 * scales.astype(np.float32)).astype(np.float16)
        return np.stack([scales, zeros], axis=-1).swapaxes(0, 1)


@dataclass(frozen=True)
class FeaturesLayout(CacheLayout):
    """One feature vector for each token, [P, S, D], always floats and whole on every device.

    Attributes:
        size: elements of a feature, D.
    """

    size: int

    def pool(self, num_blocks: int, block_size: int, dtype: CacheDtype, ranges: Any = None) -> Any:
        """See ``CacheLayout``."""
        return PoolArray((num_blocks, block_size, self.size), dtype.dtype, (None, None, None))

    def block_size(self, pool: jax.Array) -> int:
        """See ``CacheLayout``."""
        return int(pool.shape[1])

    def refusal(self, bits: int) -> str | None:
        """See ``CacheLayout``. Features remain floats with any policy."""
        return None
