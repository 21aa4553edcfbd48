"""GPTQ: modules built here element by element, from the description of the layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from jaxdeploy.errors import CheckpointError, UnsupportedModelError
from jaxdeploy.formats import gptq, gptq_v2

Array = np.ndarray[Any, Any]
N, K, GROUP = 32, 64, 16
G = K // GROUP


def config_of(bits: int, version: str = "gptq", **more: Any) -> dict[str, Any]:
    sym = {"sym": False}
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version, **sym, **more}


def words(values: Sequence[int], bits: int) -> list[int]:
    """One row of bits, the first value lowest, cut into words."""
    row = sum(int(value) << (bits * i) for i, value in enumerate(values))
    return [(row >> (32 * i)) & 0xFFFF_FFFF for i in range(len(values) * bits // 32)]


def int32(rows: list[list[int]]) -> Array:
    return np.array(rows, np.uint32).view(np.int32)


def drawn(bits: int, least_zero: int = 1) -> tuple[Array, Array, Array]:
    """q [N, K], scales and zeros [N, G]."""
    random = np.random.default_rng(bits)
    scales = random.uniform(0.01, 0.1, (N, G)).astype(np.float16)
    q = random.integers(0, 1 << bits, (N, K), np.uint8)
    return q, scales, random.integers(least_zero, 1 << bits, (N, G), np.uint8)


def stored(weight: tuple[Array, Array, Array], bits: int, minus: int, groups: Sequence[int] | None) -> dict[str, Array]:
    """What a file has; ``minus`` is taken from zero points."""
    q, scales, zeros = weight
    arrays = {
        "qweight": int32([words(q[n].tolist(), bits) for n in range(N)]).T.copy(),
        "qzeros": int32([words([int(zeros[n, g]) - minus for n in range(N)], bits) for g in range(G)]),
        "scales": scales.T.copy(),
    }
    return arrays if groups is None else arrays | {"g_idx": np.array(groups, np.int32)}


NEIGHBOURS = [k // GROUP for k in range(K)]
SCATTERED = [(5 * k + 3) % G for k in range(K)]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("version", "minus"), [("gptq", 1), ("gptq_v2", 0), ("GPTQ", 1)])
@pytest.mark.parametrize("groups", [NEIGHBOURS, SCATTERED])
def test_decode(bits: int, version: str, minus: int, groups: list[int]) -> None:
    weight, config = drawn(bits), config_of(bits, version)
    gptq.check(config)
    decoded = gptq.decode(stored(weight, bits, minus, groups), N, K, config)
    for name, expected in zip(("q", "scales", "zeros"), weight, strict=True):
        np.testing.assert_array_equal(getattr(decoded, name), expected, strict=True)
    assert decoded.bits == bits
    assert (None if decoded.groups is None else decoded.groups.tolist()) == (None if groups == NEIGHBOURS else groups)
    value, (q, scales, zeros) = decoded.value(), weight
    for n, k in ((0, 0), (3, 17), (31, 63)):
        g = groups[k]
        assert value[n, k] == np.float32(int(q[n, k]) - int(zeros[n, g])) * np.float32(scales[n, g])


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("version", "minus"), [("gptq", 0), ("gptq_v2", 1)])
def test_the_other_version_is_noticed(bits: int, version: str, minus: int) -> None:
    weight = drawn(bits)
    decoded = gptq.decode(stored(weight, bits, minus, None), N, K, config_of(bits, version))
    assert (decoded.zeros != weight[2]).all()


def test_another_order_is_noticed() -> None:
    weight = drawn(4)
    backwards = weight[0].reshape(N, -1, 8)[..., ::-1].reshape(N, K)
    decoded = gptq.decode(stored((backwards, *weight[1:]), 4, 1, None), N, K, config_of(4))
    assert (decoded.q != weight[0]).any()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("groups", [NEIGHBOURS, SCATTERED])
def test_encode_and_tensors(bits: int, version: str, groups: list[int]) -> None:
    config = config_of(bits, version)
    built = stored(drawn(bits), bits, int(version == "gptq"), groups)
    encoded = gptq.encode(gptq.decode(built, N, K, config), config)
    specs = gptq.tensors(N, K, config)
    assert encoded.keys() == built.keys() == specs.keys()
    for suffix, spec in specs.items():
        np.testing.assert_array_equal(encoded[suffix], built[suffix], strict=True)
        assert (encoded[suffix].shape, encoded[suffix].dtype.kind) == (spec.shape, spec.kind)
        assert encoded[suffix].flags.c_contiguous
        assert spec.optional == (suffix == "g_idx")


def test_a_zero_point_of_0_borrows_from_its_word() -> None:
    """As GPTQModel writes and reads v1 of 4 bits; one of 16 does not exist."""
    zeros = np.full((N, G), 8, np.uint8)
    zeros[0], zeros[9], zeros[31] = 0, 0, 0
    weight = (drawn(4)[0], drawn(4)[1], zeros)
    built = stored(weight, 4, 0, NEIGHBOURS)
    less = [[(int(word) & 0xFFFF_FFFF) - 0x1111_1111 for word in row] for row in built["qzeros"]]
    built["qzeros"] = int32([[word & 0xFFFF_FFFF for word in row] for row in less])
    assert built["qzeros"].view(np.uint32)[0, 0] & 0xFF == 0x6F
    decoded = gptq.decode(built, N, K, config_of(4))
    np.testing.assert_array_equal(decoded.zeros, zeros)
    np.testing.assert_array_equal(gptq.encode(decoded, config_of(4))["qzeros"], built["qzeros"])


def test_a_zero_point_of_0_wraps_in_3_bits() -> None:
    weight = drawn(3, least_zero=0)
    assert (weight[2] == 0).any()
    built = stored((*weight[:2], (weight[2] - np.uint8(1)) % np.uint8(8)), 3, 0, NEIGHBOURS)
    decoded = gptq.decode(built, N, K, config_of(3))
    np.testing.assert_array_equal(decoded.zeros, weight[2])
    np.testing.assert_array_equal(gptq.encode(decoded, config_of(3))["qzeros"], built["qzeros"])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    gptq._say_that_it_is_v2.cache_clear()
    with caplog.at_level(logging.WARNING, "jaxdeploy"):
        yield caplog
    gptq._say_that_it_is_v2.cache_clear()


@pytest.mark.parametrize(("bits", "middle"), [(3, 4), (4, 8)])
@pytest.mark.parametrize("more", [{"sym": True}, {"sym": True, "checkpoint_format": None}])
def test_v2_that_calls_itself_v1(said: pytest.LogCaptureFixture, bits: int, middle: int, more: dict[str, Any]) -> None:
    q, scales, _ = drawn(bits)
    built = stored((q, scales, np.full((N, G), middle, np.uint8)), bits, 0, None)
    for _ in range(2):
        assert (gptq.decode(built, N, K, config_of(bits, **more)).zeros == middle).all()
    assert [record.getMessage() for record in said.records] == [
        "checkpoint_format=gptq, but the zero points are stored as gptq_v2 does: they are read as that"
    ]


@pytest.mark.parametrize(("zero", "sym", "minus"), [(8, True, 1), (9, False, 1), (8, False, 1)])
def test_v1_that_is_v1(said: pytest.LogCaptureFixture, zero: int, sym: bool, minus: int) -> None:
    q, scales, _ = drawn(4)
    built = stored((q, scales, np.full((N, G), zero, np.uint8)), 4, minus, None)
    assert (gptq.decode(built, N, K, config_of(4, sym=sym)).zeros == zero).all()
    assert not said.records


@pytest.mark.parametrize("stored_groups", [[0] * K, [-1] * K, None])
def test_groups_that_say_nothing(stored_groups: list[int] | None) -> None:
    assert gptq.decode(stored(drawn(4), 4, 1, stored_groups), N, K, config_of(4)).groups is None


@pytest.mark.parametrize(
    "wrong", [[0] * (GROUP + 1) + NEIGHBOURS[GROUP + 1 :], [G, *SCATTERED[1:]], [-1, *SCATTERED[1:]]]
)
def test_groups_that_are_none(wrong: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"g_idx must give 16 of 64 inputs to each of 4 groups; download"):
        gptq.decode(stored(drawn(4), 4, 1, wrong), N, K, config_of(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bits": 8},
            r"bits=8 is not supported in a GPTQ checkpoint, only 3 and 4; quantise the model to one of these",
        ),
        ({"bits": 2}, r"bits=2 is not supported"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format=marlin is not supported, only gptq and gptq_v2; quan"),
        (
            {"dynamic": {"+:.*down.*": {"bits": 8}}},
            r"dynamic='\+:\.\*down\.\*' gives modules a bits of their own, .*; quan",
        ),
        ({"dynamic": {".*down.*": {"group_size": 32}}}, r"a group_size of their own, .* with group_size=16 everywhere"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        gptq.check({**config_of(4), **change})


def test_what_gptqmodel_writes_passes() -> None:
    more: dict[str, Any] = {
        "desc_act": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:2.0.0"]},
    }
    dynamic = {"-:.*gate.*": {}, "+:.*up.*": {"bits": 4, "desc_act": False}, "+:.*q.*": None}
    gptq.check(config_of(4, **more, dynamic=dynamic))


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"outputs=16 and inputs=64 must be multiples of 32 in GPTQ of 3 bits; l"
    ):
        gptq.tensors(16, K, config_of(3))
    with pytest.raises(
        UnsupportedModelError, match=r"outputs=12 and inputs=64 must be multiples of 8 in GPTQ of 4 bits; l"
    ):
        gptq.tensors(12, K, config_of(4))
    with pytest.raises(UnsupportedModelError, match=r"group_size=16 must be -1 or divide the 72 inputs"):
        gptq.tensors(N, 72, config_of(4))


def test_describe() -> None:
    settings: dict[str, Any] = {"bits": 3, "group_size": -1, "symmetric": True, "act_order": True}
    described = gptq.describe(**settings, skipped=["self_attn.q_proj"])
    assert described == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 3,
        "group_size": -1,
        "desc_act": True,
        "sym": True,
        "lm_head": False,
        "dynamic": {r"-:(.*\.)?self_attn\.q_proj$": {}},
    }
    assert "dynamic" not in gptq.describe(**settings, skipped=())
    assert gptq_v2.describe(**settings, skipped=["self_attn.q_proj"]) == {**described, "checkpoint_format": "gptq_v2"}


def test_symmetric_weights_have_the_zero_point_that_readers_take_for_granted() -> None:
    decoded = gptq.decode(stored(drawn(4), 4, 1, None), N, K, config_of(4))
    with pytest.raises(AssertionError, match="readers ignore the zero points"):
        gptq.encode(decoded, config_of(4, sym=True))
