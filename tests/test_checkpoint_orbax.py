from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.checkpoint.orbax import TrainingCheckpoints
from jaxdeploy.errors import CheckpointError


def state_of(step: int) -> dict[str, object]:
    weights = {"a": jnp.full((3, 2), step, jnp.float32), "b": [jnp.arange(4, dtype=jnp.bfloat16) * step]}
    return {"params": weights, "step": jnp.int32(step)}


def test_keeps_the_last_steps_and_resumes(tmp_path: Path) -> None:
    with TrainingCheckpoints(tmp_path / "run", keep=2) as first:
        assert first.latest() is None
        for step in (10, 20, 30):
            first.save(step, state_of(step))
    with TrainingCheckpoints(tmp_path / "run", keep=2) as again:
        assert again.steps() == [20, 30]
        assert again.latest() == 30
        restored = again.restore(30, like=state_of(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(30))
    assert restored["params"]["b"][0].dtype == jnp.bfloat16


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        with pytest.raises(CheckpointError, match=r"^step=1 is already saved in .*; remove it or use another folder$"):
            checkpoints.save(1, state_of(1))


def test_absent_step_names_those_that_exist(tmp_path: Path) -> None:
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state_of(4))
        with pytest.raises(CheckpointError, match=r"^step=5 is not in .*; saved steps: \[4\]$"):
            checkpoints.restore(5, like=state_of(0))


def test_other_tree_is_one_line(tmp_path: Path) -> None:
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        with pytest.raises(
            CheckpointError, match=r"does not fit this training state .*; use another folder$"
        ) as caught:
            checkpoints.restore(1, like={"params": jnp.zeros(3)})
    assert "\n" not in str(caught.value)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"^checkpoints=.*/file/run cannot be written \(.*\); use another folder$"
    ):
        TrainingCheckpoints(tmp_path / "file" / "run")
