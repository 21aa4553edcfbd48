"""One tree of errors. Each class knows the exit code of a command and the HTTP status of a response.

A message reads ``field=value rule; what to do`` and stands on its own: callers print it as it is, without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_LINE = 1000


class JaxdeployError(Exception):
    """Anything that a user can mend. ``exit_code`` is for commands, ``http_status`` for the server."""

    exit_code = 2
    http_status = 500


class ConfigError(JaxdeployError):
    """A setting has a value it cannot have, or an unknown name."""

    http_status = 400


class ModelNotFoundError(JaxdeployError):
    """The model's folder, or its id on the hub, cannot be reached."""

    http_status = 404


class CheckpointError(JaxdeployError):
    """The files of a checkpoint do not fit together; the message lists every fault that was found.

    Names and values from files are part of messages, so control characters are escaped and long lines are cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(_shown, message.split("\n"))))

    @classmethod
    def collect(cls, title: str, faults: Sequence[str]) -> CheckpointError:
        """One error for many faults: ``title`` on the first line, then one fault a line."""
        return cls("\n".join([title, *("  " + _shown(fault.replace("\n", " ")) for fault in faults)]))


class UnsupportedModelError(JaxdeployError):
    """The architecture, or an option of it, is not implemented."""


class RequestError(JaxdeployError):
    """One request cannot be served as it was asked for; others are not touched."""

    http_status = 400


class RequestFailedError(JaxdeployError):
    """A fault inside the server ended one request; other requests continue."""


class NonFiniteError(RequestFailedError):
    """The model computed logits that are NaN or infinite."""


class UnknownAdapterError(RequestError):
    """A request asks for an adapter that is not loaded."""

    http_status = 404


class ContextLengthError(RequestError):
    """Prompt and session do not fit into ``session_len``."""


class CacheTooSmallError(ConfigError):
    """The KV cache cannot hold one sequence; the message shows the arithmetic."""


def _shown(line: str) -> str:
    """``line`` in printable characters, its middle left out where it is long."""
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
