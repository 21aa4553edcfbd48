"""The packed fields of a sequence that are the same in all its steps."""

from __future__ import annotations

from array import array

import numpy as np

from jaxdeploy.engine.device.inputs import SAMPLING_FLOATS
from jaxdeploy.engine.scheduling.sequence import Sequence


def settings_of(sequence: Sequence) -> array[int]:
    """Return the values of ``SETTINGS`` for a sequence, which keeps them after the first call."""
    if sequence.settings is None:
        sampling = sequence.sampling
        floats = np.array([getattr(sampling, name) for name in SAMPLING_FLOATS], np.float32)
        seed = np.array(sampling.seed & 0xFFFFFFFF, np.uint32)
        top_k = 1 if sampling.greedy else sampling.top_k
        bits = int(seed.view(np.int32)), *floats.view(np.int32).tolist()
        sequence.settings = array("i", (sequence.prompt_length, top_k, *bits))
    return sequence.settings
