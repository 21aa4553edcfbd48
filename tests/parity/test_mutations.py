"""The comparison can fail: a model that is wrong in one place differs by far more than the tolerance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_cases import CASES, GOLDENS, NEW_TOKENS

from jaxdeploy.models.decoder import decoder_from
from tests.parity.measure import (
    TOLERANCE,
    fast_and_slow,
    greedy_reply,
    load_model,
    read_expected,
    relative_error,
    submodule_outputs,
)
from tests.parity.mutations import mutants


@pytest.mark.parametrize("name", fast_and_slow(case.name for case in CASES))
def test_a_slip_shows_in_the_logits(name: str) -> None:
    expected = read_expected(GOLDENS / name)
    unseen = {}
    for label, config, params in mutants(*load_model(GOLDENS / name)):
        outputs = submodule_outputs(decoder_from(config, params), expected["prompt"])
        error = relative_error(outputs["logits"], expected["logits"])
        if error < 50 * TOLERANCE:
            unseen[label] = error
    assert not unseen


@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", {"rope_parameters": {"rope_theta": 11000.0}}), ("mistral_window", {"sliding_window": 7})],
)
def test_a_slip_shows_in_the_reply(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """The engine's reply hangs on positions and windows: wrong by a little, other tokens."""
    shutil.copytree(GOLDENS / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    expected = read_expected(tmp_path)
    assert greedy_reply(tmp_path, expected["prompt"], NEW_TOKENS) != expected["greedy"].tolist()
