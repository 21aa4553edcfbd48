"""AWQ: modules built here element by element, from the description of the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxdeploy.errors import UnsupportedModelError
from jaxdeploy.formats import awq

Array = np.ndarray[Any, Any]
N, K, GROUP = 16, 64, 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}


def word(values: Sequence[int]) -> int:
    """Eight integers, the first lowest."""
    return sum(int(value) << (4 * place) for place, value in enumerate(values))


def along_outputs(values: Array, order: Sequence[int] = ORDER) -> Array:
    """[N, X] → int32 [X, N / 8]."""
    words = [
        [word([values[8 * c + i, x] for i in order]) for c in range(len(values) // 8)] for x in range(values.shape[1])
    ]
    return np.array(words, np.uint32).view(np.int32)


@pytest.fixture(scope="module")
def weight() -> tuple[Array, Array, Array]:
    """q [N, K], scales and zeros [N, G]."""
    random = np.random.default_rng(0)
    scales = random.uniform(0.01, 0.1, (N, K // GROUP)).astype(np.float16)
    return random.integers(0, 16, (N, K), np.uint8), scales, random.integers(0, 16, (N, K // GROUP), np.uint8)


def stored(weight: tuple[Array, Array, Array], order: Sequence[int] = ORDER) -> dict[str, Array]:
    q, scales, zeros = weight
    return {"qweight": along_outputs(q, order), "qzeros": along_outputs(zeros, order), "scales": scales.T.copy()}


def test_decode(weight: tuple[Array, Array, Array]) -> None:
    q, scales, zeros = weight
    decoded = awq.decode(stored(weight), N, K, CONFIG)
    np.testing.assert_array_equal(decoded.q, q)
    np.testing.assert_array_equal(decoded.zeros, zeros)
    np.testing.assert_array_equal(decoded.scales, scales)
    assert (decoded.groups, decoded.bits, decoded.scales.dtype) == (None, 4, np.float16)
    value = decoded.value()
    assert (value.dtype, value.shape) == (np.float32, (N, K))
    for n, k in ((0, 0), (3, 31), (3, 32), (15, 63)):
        g = k // GROUP
        assert value[n, k] == np.float32(int(q[n, k]) - int(zeros[n, g])) * np.float32(scales[n, g])


def test_another_order_is_noticed(weight: tuple[Array, Array, Array]) -> None:
    decoded = awq.decode(stored(weight, range(8)), N, K, CONFIG)
    assert (decoded.q != weight[0]).any()
    assert (decoded.zeros != weight[2]).any()


def test_encode_and_tensors(weight: tuple[Array, Array, Array]) -> None:
    built = stored(weight)
    encoded = awq.encode(awq.decode(built, N, K, CONFIG), CONFIG)
    assert encoded.keys() == built.keys() == awq.tensors(N, K, CONFIG).keys()
    for suffix, spec in awq.tensors(N, K, CONFIG).items():
        np.testing.assert_array_equal(encoded[suffix], built[suffix], strict=True)
        assert (encoded[suffix].shape, encoded[suffix].dtype.kind) == (spec.shape, spec.kind)
        assert encoded[suffix].flags.c_contiguous


@pytest.mark.parametrize(
    "config",
    [
        {"version": "GEMM", "bits": 4, "group_size": GROUP},
        {"version": "GEMM", "w_bit": 4, "q_group_size": GROUP, "zero_point": True},
        {"format": "gemm", "bits": 4, "group_size": GROUP},
        {"checkpoint_format": "gemm", "bits": 4, "group_size": GROUP},
        {"version": None, "bits": 4, "group_size": GROUP, "modules_to_not_convert": None},
    ],
)
def test_spellings_of_others(config: dict[str, Any]) -> None:
    awq.check(config)
    assert awq.group_count(K, config) == K // GROUP


def test_one_group() -> None:
    assert awq.group_count(K, {"group_size": -1}) == 1
    assert awq.group_count(256, {}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits=8 is not supported in an AWQ checkpoint; quantise the model to 4 bits"),
        ({"version": "GEMV"}, "version=GEMV of AWQ is not supported, only gemm; quantise the model with version gemm"),
        ({"version": "marlin"}, "version=marlin of AWQ"),
        ({"backend": "llm-awq"}, "version=llm-awq of AWQ"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    awq.check(CONFIG)
    with pytest.raises(UnsupportedModelError, match=message):
        awq.check({**CONFIG, **change})


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedModelError, match=r"outputs=12 must be a multiple of 8 in AWQ; leave the module as"):
        awq.tensors(12, K, CONFIG)
    with pytest.raises(UnsupportedModelError, match=r"group_size=32 must be -1 or divide the 48 inputs of every"):
        awq.tensors(N, 48, CONFIG)
    with pytest.raises(UnsupportedModelError, match=r"group_size=0 must be -1 or divide"):
        awq.group_count(K, {"group_size": 0})


def test_describe() -> None:
    described = awq.describe(bits=4, group_size=64, symmetric=False, act_order=False, skipped=())
    assert described == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
    }
    kept = awq.describe(bits=4, group_size=64, symmetric=True, act_order=False, skipped=["mlp.down_proj"])
    assert (kept["zero_point"], kept["modules_to_not_convert"]) == (False, ["mlp.down_proj"])
