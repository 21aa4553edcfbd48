"""Jinja chat templates, which come from strangers: compiled in a sandbox that reaches nothing but the messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jaxdeploy.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Render = Callable[[Mapping[str, Any]], str]


def compile_template(source: str) -> Render:
    """A function from a template's variables to its text, with the settings and additions that transformers gives.

    It raises ``RequestError`` where the template refuses the messages, fails on them, or reaches for internals.

    Raises:
        CheckpointError: the source is no valid Jinja.
    """
    import jinja2

    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        fault = f"chat_template line {error.lineno} is not valid Jinja ({error.message})"
        raise CheckpointError(f"{fault}; mend it or name a built-in one with --chat-template") from error

    def render(variables: Mapping[str, Any]) -> str:
        try:
            return template.render(_plain(variables))
        except Exception as error:  # whatever a stranger's code may raise
            raise RequestError(f"messages are refused by the chat template ({error}); change the messages") from error

    return render


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import ext

    sandbox, generation, namespace = _classes()
    environment = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, generation])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=namespace, dict=_dict
    )
    return environment


def _classes() -> tuple[type[ImmutableSandboxedEnvironment], type[Any], type[Any]]:
    """Built on first use: jinja2 is imported only where a template is."""
    from jinja2 import Undefined, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses aloud: jinja's own sandbox lets ``{{ x.__class__ }}`` pass as an empty text."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
            raise SecurityError(f"{attribute} of {type(obj).__name__} is out of a template's reach")

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant said, for training; the text is not changed by it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class SafeNamespace(Namespace):
        """Stores no underscore names, behind which Python keeps its internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in (values := dict(*rest, **kwargs)):
                _refuse_internal(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_internal(name)
            super().__setitem__(name, value)

    def _refuse_internal(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot store {name!r}")

    return Sandbox, Generation, SafeNamespace


def _raise_exception(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _plain(value: Any) -> Any:
    """A copy of plain JSON values, so that no method of a caller's object is within reach of the template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
