"""Which backend of an op runs, where tiles come from, and what is said when none can."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend_report, tuning
from pallas_kernels.dispatch import ENVIRONMENT, OPS, NoBackendError, RefusalError, dispatch, need_gpu
from pallas_kernels.numerics import sum_bound, unit_roundoff
from pallas_kernels.target import Target, current_target

CPU = Target("cpu", "cpu")
H200 = Target("gpu", "NVIDIA H200", (9, 0), 132)
A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)

BACKENDS = {"hopper": "fake_hopper", "ampere": "fake_ampere", "reference": "fake_reference"}


@dataclass(frozen=True)
class FakeCall:
    """A call of ``paged_attention``, whose backends the tests replace."""

    OP: ClassVar = "paged_attention"

    value: int

    def validate(self) -> None:
        if self.value < 0:
            raise ValueError(f"value={self.value} must not be negative")


def fake_backend(name: str, lowest: tuple[int, int] | None, largest: int) -> ModuleType:
    """A backend for GPUs from ``lowest`` on (any device without) that refuses arguments above ``largest``."""

    def check_device(target: Target) -> None:
        if lowest:
            need_gpu(target, lowest)

    def check(call: FakeCall) -> None:
        if call.value > largest:
            raise RefusalError(f"needs value <= {largest}, have {call.value}")

    def run(call: FakeCall, tiles: Any) -> str:
        if tiles is not None:
            raise RefusalError("has no tiles")
        return f"{name} {call.value}"

    module = ModuleType(f"fake_{name}")
    vars(module).update(check_device=check_device, check=check, run=run)
    return module


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    for module in (
        fake_backend("hopper", (9, 0), 10),
        fake_backend("ampere", (8, 0), 100),
        fake_backend("reference", None, 1000),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def run(monkeypatch: pytest.MonkeyPatch, target: Target, value: int = 1, backend: str | None = None) -> Any:
    monkeypatch.setattr("pallas_kernels.dispatch.current_target", lambda: target)
    monkeypatch.setattr("pallas_kernels.paged_attention.BACKENDS", BACKENDS)
    return dispatch(FakeCall(value), backend=backend)


@pytest.mark.parametrize(
    ("target", "value", "chosen"),
    [
        (H200, 1, "hopper 1"),
        (H200, 11, "ampere 11"),
        (A100, 1, "ampere 1"),
        (A100, 101, "reference 101"),
        (CPU, 1, "reference 1"),
    ],
)
def test_the_first_that_accepts_runs(monkeypatch: pytest.MonkeyPatch, target: Target, value: int, chosen: str) -> None:
    assert run(monkeypatch, target, value) == chosen


def test_all_refusals_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoBackendError) as caught:
        run(monkeypatch, A100, 2000)
    assert str(caught.value) == (
        "paged_attention: hopper needs sm_90 or newer, have sm_80; "
        "ampere needs value <= 100, have 2000; reference needs value <= 1000, have 2000"
    )


def test_an_invalid_call_reaches_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^value=-1 must not be negative$"):
        run(monkeypatch, H200, -1)


def test_a_named_backend_is_the_only_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, H200, backend="reference") == "reference 1"
    with pytest.raises(NoBackendError, match=r"^paged_attention: hopper needs sm_90 or newer, have sm_80$"):
        run(monkeypatch, A100, backend="hopper")


def test_a_named_backend_is_interpreted_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, CPU, backend="hopper") == "hopper 1"
    assert CPU.interpret
    assert not H200.interpret


def test_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend=cuda is none of paged_attention's; choose from hopper, ampere, ref"):
        run(monkeypatch, H200, backend="cuda")


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        ("ampere", "ampere 1"),
        ("paged_attention=ampere", "ampere 1"),
        ("nothing-of-ours,paged_attention=reference", "reference 1"),
        ("", "hopper 1"),
    ],
)
def test_the_environment_names_one(monkeypatch: pytest.MonkeyPatch, value: str, chosen: str) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    assert run(monkeypatch, H200) == chosen
    assert run(monkeypatch, H200, backend="reference") == "reference 1", "an argument wins"


def test_the_environment_names_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "attention=ampere")
    with pytest.raises(ValueError, match="PALLAS_KERNELS=attention=ampere names no op; choose from decode_layer, kv"):
        run(monkeypatch, H200)


def test_the_report_names_every_backend_of_every_op() -> None:
    lines = backend_report()
    assert {line.op for line in lines} == set(OPS)
    assert all(line.usable != bool(line.reason) for line in lines)
    assert {line.backend for line in lines if line.usable} <= {"reference", "xla"}, "this machine has no GPU"
    assert {line.op for line in lines if line.backend == "reference" and line.usable} == set(OPS)


def test_the_target_of_this_machine() -> None:
    assert current_target() == Target("cpu", "cpu")
    assert (str(CPU), str(H200)) == ("cpu", "sm_90")


@dataclass(frozen=True)
class Tiles:
    tile_m: int
    split: int = 1


def test_tiles_explicit_then_measured_then_heuristic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    path = tuning.table_path("op", "NVIDIA H200")
    path.parent.mkdir()
    path.write_text(json.dumps({"tiles": {"m=16": {"split": 4}}}))
    assert tuning.choose("op", "NVIDIA H200", "m=16", Tiles(1), Tiles(2)) == Tiles(1)
    assert tuning.choose("op", "NVIDIA H200", "m=16", None, Tiles(2)) == Tiles(2, split=4)
    assert tuning.choose("op", "NVIDIA H200", "m=32", None, Tiles(2)) == Tiles(2)
    assert tuning.choose("op", "NVIDIA A100", "m=16", None, Tiles(2)) == Tiles(2)
    tuning.table.cache_clear()


def test_the_error_bound_holds_for_an_honest_sum_and_not_for_a_wrong_one() -> None:
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape, np.float32) for shape in ((64, 512), (512, 64)))
    exact, magnitude = (f(x).astype(np.float64) @ f(w).astype(np.float64) for f in (np.asarray, np.abs))
    bound = sum_bound(exact, magnitude, 512, jnp.bfloat16)
    honest = np.asarray(jnp.asarray(x @ w).astype(jnp.bfloat16).astype(jnp.float32))
    assert (np.abs(honest - exact) <= bound).all()
    assert (np.abs((x[:, 1:] @ w[1:]) - exact) > bound).mean() > 0.5, "a term left out"
    assert unit_roundoff(jnp.bfloat16) == 2**-8
