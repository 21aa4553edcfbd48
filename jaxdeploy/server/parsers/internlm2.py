"""InternLM2's calls: ``<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>``."""

from __future__ import annotations

from jaxdeploy.server.parsers.events import Parser
from jaxdeploy.server.parsers.marked_calls import MarkedCalls

SIGN = "<|plugin|>"
"""In a chat template it tells of this form."""

BEGIN, BETWEEN = "<|action_start|><|plugin|>\n", "<|action_end|>\n<|action_start|><|plugin|>\n"
END = "<|action_end|>"
ARGUMENTS = "parameters"


def parser() -> Parser:
    """For one reply."""
    return MarkedCalls("<|action_start|><|plugin|>", "<|action_end|>")
