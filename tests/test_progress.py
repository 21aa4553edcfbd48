"""Reports of how far a long task is."""

from __future__ import annotations

import logging

import pytest

from jaxdeploy import progress
from jaxdeploy.progress import counted


@pytest.mark.parametrize(("interval", "lines"), [(0.0, ["1 of 3", "2 of 3", "3 of 3"]), (60.0, ["3 of 3"])])
def test_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interval: float, lines: list[str]
) -> None:
    """Not too many of them, and always the last."""
    monkeypatch.setattr(progress, "INTERVAL", interval)
    with caplog.at_level(logging.INFO, "jaxdeploy"):
        assert list(counted([1, 2, 3], "compiling", "compiled", bar=False)) == [1, 2, 3]
        with progress.progress("loading", "loaded", 2**20, "B", bar=False) as update:
            update(2**20)
    assert caplog.messages == [*(f"compiled: {line} programs, 0 s" for line in lines), "loaded: 1 of 1 MiB, 0 s"]


def test_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted([1, 2], "compiling", "compiled", bar=True)) == [1, 2]
    assert "compiling:   0%" in capsys.readouterr().err
