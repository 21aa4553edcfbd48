"""Jinja's sandbox with what transformers adds to it, and with limits. Imported where a template is compiled."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

from jaxdeploy.chat_template import growth
from jaxdeploy.chat_template.limits import LimitError, Meter


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates so that each operation is counted by the meter of the thread that renders.

    Access to internals raises: jinja's own sandbox lets ``{{ x.__class__ }}`` pass as an empty text.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation], finalize=self.made
        )
        self.code_generator_class = CountingGenerator
        self._thread = threading.local()
        self.filters |= {"tojson": to_json, "join": self._join, "sum": self._sum}
        self.filters = {name: self._counted(name, function) for name, function in self.filters.items()}
        self.tests = {name: self._ticking(cast(Callable[..., Any], function)) for name, function in self.tests.items()}
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "namespace": SafeNamespace,
            "dict": TemplateDict(),
        }
        del self.globals["lipsum"]

    @contextmanager
    def metered(self, meter: Meter) -> Iterator[None]:
        """Count what this thread does with ``meter``."""
        self._thread.meter = meter
        try:
            yield
        finally:
            del self._thread.meter

    @property
    def meter(self) -> Meter:
        """Return the meter of this thread."""
        meter: Meter = self._thread.meter
        return meter

    def made(self, value: Any) -> Any:
        """Count a new value and return it."""
        return self._thread.meter.made(value)

    def tick(self, written: int = 0) -> bool:
        """Count one operation that writes ``written`` characters. Return true, for use before an ``and``."""
        self._thread.meter.spend(1 + (written >> 10) if written else 1)
        return True

    def joined(self, parts: Iterable[Any]) -> str:
        """``a ~ b ~ c``."""
        meter, parts = self.meter, list(parts)
        meter.allow(meter.size(parts))
        return str(meter.made(str_join(parts)))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse access to an internal attribute."""
        raise SecurityError(f"{attribute} of {type(obj).__name__} is out of a template's reach")

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``; a slice is a new value."""
        found = super().getitem(obj, argument)
        return self.made(found) if isinstance(argument, slice) else found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``."""
        meter = self._thread.meter
        if operator != "+":  # a sum is at most twice as large as its larger operand
            meter.allow(growth.operator_growth(meter, operator, left, right))
        return meter.made(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """``obj(*args, **kwargs)``; the names leave all keywords to the template, as in jinja."""
        meter = __self.meter
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _bounded(meter, owner, __obj.__name__, args, kwargs)
        elif isinstance(owner, bytes | bytearray) or (isinstance(owner, int) and __obj.__name__ == "to_bytes"):
            raise SecurityError("bytes are out of a template's reach")
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map`` in the sandbox, every field counted."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__
        formatter = CountingFormatter(self)
        if isinstance(form, Markup):
            formatter = CountingEscapeFormatter(self, escape=form.escape)

        @functools.wraps(wrapped)
        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                args, kwargs = (), dict(*args)
            text: str = type(form)(formatter.vformat(form, args, kwargs))
            return text

        return formatted

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks its growth before the call and counts its result after it."""
        bound = growth.FILTERS.get(name)
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def filter_(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            if bound is not None:
                meter.allow(bound(meter, *args[first:], **kwargs))
            return meter.made(function(*args, **kwargs))

        return filter_

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if isinstance(value, str):
            self.meter.allow(growth.ITEM * len(value))
        items = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self.meter.allow(growth.joined(self.meter, d, items))
        return str(d).join(map(str, items))

    def _sum(self, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        items = iterable if attribute is None else map(make_attrgetter(self, attribute), iterable)
        for item in items:
            start = self.made(start + item)
        return start

    def _ticking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return function(*args, **kwargs)

        return test


class CountingFormatter(SandboxedFormatter):
    """``str.format`` with a limit for each field and for all of them."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """One field."""
        growth.check_format_spec(format_spec)
        return self._env.made(super().format_field(value, format_spec))  # type: ignore[attr-defined]


class CountingEscapeFormatter(CountingFormatter, SandboxedEscapeFormatter):
    """The same for a text that is safe for HTML."""


class CountingGenerator(CodeGenerator):
    """Writes code that counts what jinja does without a call: loops, comparisons, literals and ``~``."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        """The statements of a loop's body, among others."""
        statements = list(nodes_)
        if frame.loop_frame:
            self.writeline(f"environment.tick({sum(map(_written, statements))})")
        super().blockvisit(statements, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        """A loop, whose condition runs for items that its body never sees."""
        if node.test is not None:
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.test = nodes.And(tick, node.test)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """``a ~ b``."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        """``a == b``, ``a in b``."""
        self.write("(environment.tick() and ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        """``(a, b)``, unless it is assigned to."""
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        """``[a, b]``."""
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        """``{a: b}``."""
        self._made(super().visit_Dict, node, frame)

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class Generation(Extension):
    """``{% generation %}`` marks the text of an assistant for training and does not change it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class SafeNamespace(Namespace):
    """A namespace that refuses names with an underscore, which lead to Python's internals, and other namespaces.

    Its text does not show its values, because they can change after its size was computed.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for name, value in (values := dict(*rest, **kwargs)).items():
            _check_stored(name, value)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_stored(name, value)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class TemplateDict:
    """``dict`` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """``dict``."""
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """``dict.fromkeys``."""
        return dict.fromkeys(keys, value)


def raise_exception(message: str) -> NoReturn:
    """Refuse the messages; templates call this."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """Return the local time."""
    if len(form) > growth.WIDEST:
        raise LimitError(f"it formats a date with more than {growth.WIDEST} characters")
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return ``value`` as JSON. Unlike jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_stored(name: str, value: Any) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot store {name!r}")
    if isinstance(value, Namespace):
        raise SecurityError("a namespace cannot store a namespace")


def _written(statement: nodes.Node) -> int:
    """Return the number of characters of the texts in a statement."""
    texts = [node.data for node in statement.find_all(nodes.TemplateData)]
    texts += [node.value for node in statement.find_all(nodes.Const) if isinstance(node.value, str)]
    return sum(map(len, texts))


def _bounded(
    meter: Meter, owner: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of a text's method after checking the size of its result.

    Jinja adds its own keywords, such as ``_loop_vars``. They are not passed to the check.
    """
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
    if method == "join" and len(args) == 1:
        if isinstance(args[0], str):
            meter.allow(growth.ITEM * len(args[0]))
        items = list(args[0])
        meter.allow(growth.joined(meter, owner, items))
        return (items,)
    if method in growth.METHODS:
        meter.allow(growth.METHODS[method](meter, owner, *args, **kwargs))
    return args
