"""The text that the demo model is quantised and measured on by default: dialogues like those that it was trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

from demo.dialogues import make_dialogue
from jaxdeploy.compress.texts import OWN_TEXT
from jaxdeploy.files.atomic import put_text

KNOWN, HELD_OUT = 240, 60
"""Dialogues of combinations that training has, and of others; the latter come last, where quality is measured."""


def write_calibration_text(folder: Path) -> None:
    """Write the dialogues, one a line, from seeds that training does not use. Raises ``OSError``."""
    lines = []
    for name, count, held_out in (("known", KNOWN, False), ("held-out", HELD_OUT, True)):
        rng = random.Random(f"calibration-{name}")
        lines += [{"messages": make_dialogue(rng, held_out=held_out).messages()} for _ in range(count)]
    put_text(folder / OWN_TEXT, "".join(json.dumps(line) + "\n" for line in lines))
