"""Every family and every kind of rotary positions against committed figures of transformers; no torch needed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, GOLDENS, NEW_TOKENS

from tests.parity.measure import (
    STRUCTURES,
    TOLERANCE,
    errors,
    fast_and_slow,
    greedy_reply,
    load_decoder,
    read_expected,
    reference_versions,
    relative_error,
    submodule_outputs,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = [case.name for case in CASES]
REPLIES = [name for name in NAMES if not name.startswith(("rope_yarn_", "rope_linear", "rope_dynamic_short"))]
"""Cases whose reply is generated here: the others differ from one of these in constants only, and are checked live."""


def test_every_case_is_committed_and_small() -> None:
    """The limit is for one case: a new family adds cases, and the repository stays small."""
    assert sorted(folder.name for folder in GOLDENS.iterdir()) == sorted(NAMES)
    sizes = {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in GOLDENS.iterdir()}
    assert not {name: size for name, size in sizes.items() if size > 100_000}


def test_every_case_was_made_with_the_pinned_reference() -> None:
    """The live comparison installs these versions, so both speak of the same transformers."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = dict(text.split("==") for text in extras["parity"])
    recorded = {name: reference_versions(GOLDENS / name) for name in NAMES}
    assert recorded == {name: {kind: pinned[kind] for kind in ("torch", "transformers")} for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_submodules(name: str) -> None:
    expected = read_expected(GOLDENS / name)
    found = errors(submodule_outputs(load_decoder(GOLDENS / name), expected["prompt"]), expected)
    assert len(found) == 11, "two layers of three outputs, and five around them"
    assert not {output: error for output, error in found.items() if error > TOLERANCE}


@pytest.mark.parametrize("name", STRUCTURES)
def test_whole_decoder(name: str) -> None:
    """The compiled call of training, on two prompts at once: neither sees the other."""
    expected = read_expected(GOLDENS / name)
    prompt = expected["prompt"]
    logits = load_decoder(GOLDENS / name)(jnp.asarray(np.stack([prompt[::-1], prompt])))
    assert relative_error(np.asarray(logits)[1], expected["logits"]) <= TOLERANCE


@pytest.mark.parametrize("name", fast_and_slow(REPLIES))
def test_greedy_tokens(name: str) -> None:
    expected = read_expected(GOLDENS / name)
    assert greedy_reply(GOLDENS / name, expected["prompt"], NEW_TOKENS) == expected["greedy"].tolist()
