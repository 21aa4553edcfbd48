"""Reading what the user types: several lines where a backslash ends one, or with Alt-Enter on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PROMPT, MORE = "> ", "… "


def line_reader() -> Callable[[], str]:
    """A function that returns one input. It raises ``EOFError`` at the end and ``KeyboardInterrupt`` on Ctrl-C."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            return _terminal_reader()
    return read_lines


def read_lines() -> str:
    """Read with the plain ``input``, which knows the arrow keys where ``readline`` is there."""
    with suppress(ImportError):
        import readline  # noqa: F401
    lines = [input(PROMPT)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(MORE))
    return "\n".join(lines)


def _terminal_reader() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=_key_bindings(),
        history=InMemoryHistory(),
        prompt_continuation=lambda width, number, wraps: MORE,
    )
    return lambda: session.prompt(PROMPT)


def _key_bindings() -> Any:
    """Enter sends; Alt-Enter, or Enter after a backslash, begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
