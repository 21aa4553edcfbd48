"""Input of the terminal chat. A backslash at the end of a line, or Alt-Enter on a terminal, continues the input."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader, TextIOWrapper
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.unicode_text import well_formed

PROMPT, MORE = "> ", "… "


def line_reader() -> Callable[[], str]:
    """A function that returns one input. It raises ``EOFError`` at the end and ``KeyboardInterrupt`` on Ctrl-C."""
    read = read_lines
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            read = _terminal_reader()
    return lambda: well_formed(read())


def given_prompt(flag: str | None) -> str | None:
    """Return the prompt of ``--prompt``, or that of stdin if the flag is ``-`` or missing.

    ``None``: the user types on a terminal.

    Raises:
        RequestError: stdin is empty, or has a text in addition to that of the flag.
    """
    if flag is None and sys.stdin.isatty():
        return None
    if flag is None or flag == "-":
        text = _piped()
        if not text:
            raise RequestError("stdin is empty; pipe a text into it, or give one with --prompt")
        return text
    if _is_piped():
        fault = f"prompt={flag!r:.60} and the text on stdin are two prompts"
        raise RequestError(f"{fault}; leave one out, use --prompt - for stdin alone, or add < /dev/null")
    return well_formed(flag)


def read_lines() -> str:
    """Read with the plain ``input``, which supports arrow keys if ``readline`` is available."""
    with suppress(ImportError):
        import readline  # noqa: F401
    lines = [input(PROMPT)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(MORE))
    return "\n".join(lines)


def _piped() -> str:
    """All of stdin, less the newline that ends its last line."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return well_formed(sys.stdin.read()).removesuffix("\n")


def _is_piped() -> bool:
    """Whether stdin is a file or a pipe that has a text. Never waits for one."""
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):  # there is no stdin, or a test's
        return False
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)) or not select.select([descriptor], [], [], 0)[0]:
        return False
    return isinstance(sys.stdin.buffer, BufferedReader) and bool(sys.stdin.buffer.peek(1))


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
