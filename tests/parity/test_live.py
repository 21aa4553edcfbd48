"""Every family and every kind of rotary positions against transformers, run here and now."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden_cases import CASES, GOLDENS, NEW_TOKENS, Case

from jaxdeploy.checkpoint.tensors import open_checkpoint
from tests.parity.measure import (
    TOLERANCE,
    Outputs,
    errors,
    greedy_reply,
    load_decoder,
    read_expected,
    submodule_outputs,
)

pytestmark = pytest.mark.parity

SAME = 1e-5
"""How far two runs of the reference may lie apart: other thread counts and libraries, other order of sums."""


@dataclass(frozen=True)
class Made:
    """A checkpoint that transformers wrote just now, and what it computes."""

    name: str
    folder: Path
    expected: Outputs


@pytest.fixture(scope="module", params=CASES, ids=lambda case: str(case.name))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from make_goldens import make_case

    case: Case = request.param
    folder = tmp_path_factory.mktemp("parity") / case.name
    return Made(case.name, folder, make_case(case, folder))


def test_submodules(made: Made) -> None:
    found = errors(submodule_outputs(load_decoder(made.folder), made.expected["prompt"]), made.expected)
    assert len(found) == 11, "two layers of three outputs, and five around them"
    assert not {output: error for output, error in found.items() if error > TOLERANCE}


def test_greedy_tokens(made: Made) -> None:
    assert greedy_reply(made.folder, made.expected["prompt"], NEW_TOKENS) == made.expected["greedy"].tolist()


def test_the_committed_golden_is_what_the_script_makes(made: Made) -> None:
    committed = GOLDENS / made.name
    assert _config(committed) == _config(made.folder)
    ours, theirs = open_checkpoint(committed, None), open_checkpoint(made.folder, None)
    assert set(ours) == set(theirs)
    assert all(ours[name].read().tobytes() == theirs[name].read().tobytes() for name in ours)
    expected = read_expected(committed)
    assert expected["greedy"].tolist() == made.expected["greedy"].tolist()
    assert max(errors(made.expected, expected).values()) <= SAME


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config
