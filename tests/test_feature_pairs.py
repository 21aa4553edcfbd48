"""Every feature of the engine, alone and with each other one, changes no token."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.messages import Request, SamplingParams
from tests.tiny_models import IN_A_ROW, SHAPES_IN_A_ROW, guessing, prompt, run, tiny_engine

FEATURES: dict[str, dict[str, Any]] = {
    "prefix cache": {"sharing": True},
    "sessions": {"sharing": True},
    "preemption": {"blocks": 20},
    "small chunks": {"max_prefill": 32},
    "decodes in a row": {"decode_steps": IN_A_ROW, "shapes": SHAPES_IN_A_ROW},
    "host memory": {"sharing": True, "blocks": 20, "host_blocks": 64},
    "guesses": {"guesses": "draft"},
    "tensor parallelism": {"tp": 2},
}
"""Name → what ``tiny_engine`` is to be told for it."""
OFF: dict[str, Any] = {"sharing": False}
SLOW = "tensor parallelism"


def several() -> list[Any]:
    """Each by itself, and all pairs."""
    together = [(name,) for name in FEATURES] + list(combinations(FEATURES, 2))
    slow = [[pytest.mark.slow] if SLOW in each else [] for each in together]
    return [pytest.param(each, id=" + ".join(each), marks=marks) for each, marks in zip(together, slow, strict=True)]


def talk(engine: Engine, *, sessions: bool = False) -> list[list[int]]:
    """Replies of two turns of six conversations, three of which begin alike; ``sessions``: the engine is told which."""
    common, replies = prompt(35), list[list[int]]()
    said = [[*common, *prompt(n, seed=1)] for n in (2, 9, 20)] + [list(prompt(n)) for n in (3, 20, 51)]
    for turn in range(2):
        asked = [
            Request(name, tuple(tokens), SamplingParams(max_new_tokens=12), session_id=name if sessions else None)
            for name, tokens in zip("012345", said, strict=True)
        ]
        tokens = run(engine, asked)
        replies += tokens.values()
        said = [[*before, *tokens[f"{n}"], *prompt(5, seed=turn)] for n, before in enumerate(said)]
    return replies


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return talk(tiny_engine(**OFF))


@pytest.mark.parametrize("names", several())
def test_no_token_changes(names: tuple[str, ...], expected: list[list[int]]) -> None:
    options = dict(OFF)
    for name in names:
        options |= FEATURES[name]
    method = options.pop("guesses", None)
    engine = tiny_engine(**options, speculation=guessing(method, options.get("tp", 1)) if method else None)
    assert talk(engine, sessions="sessions" in names) == expected
    assert engine.scheduler.prefixes.found > 0 or not {"prefix cache", "sessions", "host memory"} & set(names)
    if method:  # then sequences end sooner, and there is more room
        assert engine.stats.speculation.accepted > 0
    else:
        assert engine.scheduler.preemptions > 0 or "preemption" not in names
        assert engine.scheduler.prefixes.restored > 0 or "host memory" not in names
