"""Upper bounds for the size of the results of operations, methods and filters in a template.

They are computed before the operation runs: one call such as ``'x'.center(10**10)`` cannot be interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxdeploy.chat_template.limits import LimitError, Meter

Bound = Callable[..., int]
"""A function of the meter and the operation's arguments to bytes."""

BITS = 2**17
"""Of an integer."""
ITEM = 64
"""Bytes of a short string in a list."""
SLOW = 64
"""Filters written in Python take small texts only: their time grows as if the text were larger by this factor."""
WIDEST = 1000
"""Characters that one field of a formatted text may be padded to, and digits of a rounded number."""

_DIGITS = re.compile(r"\d+")


def operator_growth(meter: Meter, operator: str, left: Any, right: Any) -> int:
    """Return the bytes of ``left operator right``. Raises ``LimitError`` if the result has no bound."""
    match operator:
        case "*" if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        case "*" if isinstance(left, int) or isinstance(right, int):
            many, times = (right, left) if isinstance(left, int) else (left, right)
            return (4 * len(many) if isinstance(many, str) else meter.size(many)) * max(times, 0)
        case "**" if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        case "%" if isinstance(left, str):
            return percent_growth(meter, left, right)
    return 0


def percent_growth(meter: Meter, form: str, *values: Any) -> int:
    """Return the bytes of ``form % values``: every field may show all of the values."""
    _check_digits(form)
    if "*" in form and any(_widest(value) > WIDEST for value in values):
        raise LimitError(f"it pads a text to more than {WIDEST} characters")
    return len(form) + form.count("%") * (4 * sum(map(meter.size, values)) + WIDEST)


def check_format_spec(spec: str) -> None:
    """Raise ``LimitError`` if a field of ``str.format`` is padded too far."""
    _check_digits(spec)


def _check_digits(form: str) -> None:
    for digits in _DIGITS.findall(form):
        if len(digits) > 9 or int(digits) > WIDEST:
            raise LimitError(f"it pads a text to more than {WIDEST} characters")


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise LimitError(f"it computes an integer of more than {BITS} bits")


def _widest(value: Any) -> int:
    if isinstance(value, list | tuple):
        return max(map(_widest, value), default=0)
    if isinstance(value, Mapping):
        return max(map(_widest, value.values()), default=0)
    return abs(value) if isinstance(value, int) else 0


def _pad(meter: Meter, text: str, width: int = 80, *fill: str) -> int:
    return meter.size(text) + 4 * width


def _replace(meter: Meter, text: str, old: str, new: str, count: int = -1) -> int:
    return meter.size(text) + 4 * str(text).count(str(old)) * len(str(new))


def _split(meter: Meter, text: str, separator: str | None = None, *rest: Any, **more: Any) -> int:
    return len(text) + ITEM * (text.count(separator) + 1 if separator else len(text) // 2)


def _translate(meter: Meter, text: str, table: Mapping[int, Any]) -> int:
    return len(text) * max((meter.size(value) for value in table.values()), default=1)


def _strip(meter: Meter, text: str, characters: str | None = None) -> int:
    """Return a bound on the time, not on the size: the time grows with both lengths."""
    return meter.size(text) * len(characters or "")


METHODS: dict[str, Bound] = {
    "center": _pad,
    "expandtabs": lambda meter, text, tabsize=8: len(text) + 4 * text.count("\t") * tabsize,
    "ljust": _pad,
    "lstrip": _strip,
    "replace": _replace,
    "rjust": _pad,
    "rsplit": _split,
    "rstrip": _strip,
    "split": _split,
    "splitlines": lambda meter, text, keepends=False: _split(meter, text),
    "strip": _strip,
    "translate": _translate,
    "zfill": _pad,
}
"""Methods of texts whose results can be much larger than the text, or that are slow."""


def joined(meter: Meter, separator: str, items: list[Any]) -> int:
    """Return the bytes of ``separator.join(items)``."""
    return 4 * meter.size(items) + len(items) * str(separator).__sizeof__()


def _listed(meter: Meter, value: Any, *rest: Any, **more: Any) -> int:
    return ITEM * len(value) if isinstance(value, str) else 0


def _slow(meter: Meter, *values: Any, **more: Any) -> int:
    return SLOW * sum(map(meter.size, (*values, *more.values())))


def _indent(meter: Meter, text: str, width: int | str = 4, *rest: Any, **more: Any) -> int:
    each = width if isinstance(width, int) else len(width)
    return meter.size(text) + 4 * (text.count("\n") + 1) * each


def _wrapped(meter: Meter, text: str, *options: Any, **more: Any) -> int:
    longest = max((len(option) for option in (*options, *more.values()) if isinstance(option, str)), default=1)
    return max(len(text) * longest, _slow(meter, text))


def _batch(meter: Meter, value: Any, count: int, *fill: Any, **more: Any) -> int:
    return max(ITEM * count, _listed(meter, value))


def _round(meter: Meter, value: Any, precision: int = 0, *rest: Any) -> int:
    if abs(precision) > WIDEST:
        raise LimitError(f"it rounds to more than {WIDEST} digits")
    return 0


def _to_json(meter: Meter, value: Any, *rest: Any, indent: Any = None, separators: Any = (), **more: Any) -> int:
    given = (indent, *(separators or ()))
    if any((len(item) if isinstance(item, str) else item or 0) > 16 for item in given):
        raise LimitError("it writes JSON with an indentation or separators of more than 16 characters")
    return 0 if indent is None else _slow(meter, value)


FILTERS: dict[str, Bound] = {
    "batch": _batch,
    "center": _pad,
    "dictsort": _listed,
    "format": percent_growth,
    "groupby": _listed,
    "indent": _indent,
    "list": _listed,
    "map": _listed,
    "pprint": _slow,
    "reject": _listed,
    "rejectattr": _listed,
    "replace": _replace,
    "round": _round,
    "select": _listed,
    "selectattr": _listed,
    "slice": _batch,
    "sort": _listed,
    "striptags": _slow,
    "title": _slow,
    "tojson": _to_json,
    "trim": _strip,
    "unique": _listed,
    "urlencode": _slow,
    "urlize": _slow,
    "wordcount": _slow,
    "wordwrap": _wrapped,
    "xmlattr": _slow,
}
"""Filters, as ``METHODS``."""
