"""Hermes' calls, which Qwen's models make too: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

from jaxdeploy.server.parsers.events import Parser
from jaxdeploy.server.parsers.marked_calls import MarkedCalls

SIGN = "<tool_call>"
"""In a chat template it tells of this form."""

BEGIN, BETWEEN, END = "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
ARGUMENTS = "arguments"


def parser() -> Parser:
    """For one reply."""
    return MarkedCalls("<tool_call>", "</tool_call>")
