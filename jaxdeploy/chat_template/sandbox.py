"""Jinja chat templates, which come from strangers: compiled in a sandbox that reaches nothing but the messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdeploy.chat_template.limits import SECONDS, LimitError, Meter
from jaxdeploy.errors import CheckpointError, RequestError

MAX_SOURCE = 2**17
"""Characters. The longest published templates have about a fifth of it."""
MAX_REASON = 500
PROBE = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}
PROBE_SECONDS = 1.0
_SCALARS = frozenset({str, int, float, bool, type(None)})
MEND = "mend it or name a built-in one with --chat-template"


class TemplateError(RequestError):
    """A template gave no text. ``reason`` is what it or jinja says, in one line."""

    complaint = "the chat template failed on the messages ({}); change them or the template"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(self.complaint.format(reason))


class TemplateRefusedError(TemplateError):
    """The template raised its own ``raise_exception``."""

    complaint = "messages are refused by the chat template ({}); change the messages"


class CompiledTemplate:
    """A Jinja template with the settings and additions that transformers gives. Renderings may run in parallel.

    variables: the names that it mentions.
    reads: those of them whose values come from the caller.

    Raises:
        CheckpointError: the source is no valid Jinja, or renders nothing within the limits of ``Meter``.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"chat_template has {len(source)} characters, {MAX_SOURCE} at most; {MEND}")
        self.source = source
        try:
            self._compile(source)
        except RecursionError as error:
            raise CheckpointError(f"chat_template is nested too deeply; {MEND}") from error
        except Exception as error:  # whatever a stranger's source makes of the compiler
            raise CheckpointError(
                f"chat_template{_place(error)} is not valid Jinja ({_line(error)}); {MEND}"
            ) from error
        self._probe()

    def render(self, variables: Mapping[str, Any], seconds: float = SECONDS) -> str:
        """The text for ``variables``, of which the template sees copies.

        Raises:
            TemplateRefusedError: the template raised an exception of its own.
            TemplateError: it failed on the messages, reached for internals, or exceeded a limit.
        """
        from jinja2 import exceptions

        try:
            plain = _plain(variables)
            with self._environment.metered(Meter(plain, seconds)):
                return self._template.render(plain)
        except LimitError as error:
            raise TemplateError(f"{error}; the template is at fault") from error
        except RecursionError as error:
            raise TemplateError("its macros or the messages are nested too deeply") from error
        except Exception as error:  # whatever a stranger's code may raise
            kind = TemplateRefusedError if type(error) is exceptions.TemplateError else TemplateError
            raise kind(_line(error)) from error

    def _compile(self, source: str) -> None:
        from jinja2 import meta, nodes

        from jaxdeploy.chat_template.environment import ChatEnvironment

        self._environment = ChatEnvironment()
        with self._environment.metered(Meter(source)):
            tree = self._environment.parse(source)
            self.variables = frozenset(name.name for name in tree.find_all(nodes.Name))
            self.reads = frozenset(meta.find_undeclared_variables(tree))
            self._template = self._environment.from_string(tree)

    def _probe(self) -> None:
        """Render a short conversation: a template that exceeds the limits with it is of no use with any."""
        try:
            self.render(PROBE, PROBE_SECONDS)
        except TemplateError as error:
            if isinstance(error.__cause__, LimitError):
                raise CheckpointError(f"chat_template cannot be used: {error.__cause__}; {MEND}") from error


def _place(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return "" if line is None else f" line {line}"


def _line(error: Exception) -> str:
    """What ``error`` says, in one line."""
    text = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _plain(value: Any) -> Any:
    """A copy of plain JSON values, so that no method of a caller's object is within reach of the template."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        return {str(key): item if type(item) in _SCALARS else _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) in _SCALARS else _plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
