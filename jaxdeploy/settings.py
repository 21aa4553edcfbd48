"""Settings: dataclasses whose one declaration gives Python arguments, YAML keys and command-line flags.

Every assignment, in ``__init__`` or later, is checked on its own and raises ``ConfigError`` with the text
``field=value rule; what to do``. A name that is not a field raises too and names a field that is spelt like it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import logging
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.files.stored import read_text, shown

T = TypeVar("T")
logger = logging.getLogger("jaxdeploy")

MIN_SIMILARITY = 0.7
"""Similarity of two names from which one is suggested for the other, from 0 to 1."""

_EMPTY: tuple[Any, ...] = (False, "", [], {})
_PLAIN = (bool, int, float, str, list, tuple, dict)
"""Types whose values can be compared; arrays cannot."""
_MAX_NUMBER = 1e308
"""Whole numbers beyond it have no float; infinity and NaN fail the comparison."""
_MAX_YAML_SIZE = 256 * 2**10
"""Bytes. Longer files could take minutes to parse."""
_MAX_YAML_DEPTH = 50
_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


class Rule(NamedTuple):
    """A condition on values: its text, and a function that checks it."""

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Setting:
    """Everything known about a field except its name, type and default. See ``setting`` for the first six fields.

    Attributes:
        secret: values are never shown, and an empty one raises.
        ignored: why values are dropped, with one line logged; empty: they are not.
        missing: advice for users of a feature that does not exist yet. Values raise, except empty ones and ``fine``.
        fine: the values of a missing feature that do not raise.
        alias: the field that this one is another name of.

    At most one of ``ignored``, ``missing`` and ``alias`` is set.
    """

    help: str = ""
    choices: tuple[Any, ...] = ()
    rule: Rule | None = None
    advice: str = ""
    reads: Mapping[str, Any] | Callable[[Any], Any] | None = None
    flag: bool = True
    secret: bool = False
    ignored: str = ""
    missing: str = ""
    fine: tuple[Any, ...] = ()
    alias: str = ""

    @property
    def live(self) -> bool:
        """Whether a value is kept and does something."""
        return not (self.ignored or self.missing or self.alias)


class Described(NamedTuple):
    """A field: its default, what was said about it, its type without ``None``, and whether it is a list of that."""

    default: Any
    about: Setting
    kind: type[Any]
    is_list: bool


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    rule: Rule | None = None,
    advice: str = "",
    reads: Mapping[str, Any] | Callable[[Any], Any] | None = None,
    flag: bool = True,
) -> Any:
    """Return a dataclass field.

    Args:
        default: its default.
        help: what it does, for command lines and documentation.
        choices: the values that it takes; empty: any.
        rule: a condition on its values.
        advice: what to do about a value that breaks ``rule`` or is not in ``choices``.
        reads: texts and their values, e.g. ``int8`` and 8; or a function that converts other forms to a value.
        flag: whether command lines have it.
    """
    about = Setting(help, choices, rule, advice, reads, flag)
    return dataclasses.field(default=default, metadata={"setting": about})


def ignored(reason: str) -> Any:
    """A field of LMDeploy's that means nothing here: accepted, dropped, and one line logged."""
    return _inert(Setting(help=f"accepted and ignored: {reason}", ignored=reason))


def secret(help: str) -> Any:
    """A field for a key, or a list of keys. An empty or blank key raises ``ConfigError``, and no value is shown."""
    return dataclasses.field(default=None, repr=False, metadata={"setting": Setting(help, secret=True)})


def missing(advice: str, *fine: Any) -> Any:
    """A field of LMDeploy's without its feature: ``None``, empty values and ``fine``, its default there, are taken."""
    return _inert(Setting(help="not there yet", missing=advice, fine=fine))


def alias(target: str) -> Any:
    """Another name of the field ``target``; 0 and ``None`` leave the target alone."""
    return _inert(Setting(help=f"another name of {target}", alias=target))


def _inert(about: Setting) -> Any:
    return dataclasses.field(default=None, repr=False, compare=False, metadata={"setting": about})


@typing.dataclass_transform()
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a dataclass that checks every value and names the nearest field for an unknown one."""
    made: Any = dataclass(cls)
    hints = typing.get_type_hints(made)
    made.__settings__ = {
        field.name: Described(field.default, field.metadata["setting"], *_type_of(hints[field.name]))
        for field in dataclasses.fields(made)
    }
    made.__init__ = _naming_the_unknown(made.__init__, made)
    made.__setattr__ = _assign
    return typing.cast("type[T]", made)


def describe(cls: type[Any]) -> dict[str, Described]:
    """Field name → what is known about it, in the order of declaration."""
    known: dict[str, Described] = cls.__settings__
    return known


def unknown_setting(name: str, value: Any, names: Iterable[str], owner: str) -> ConfigError:
    """The error for a name that is not a setting of ``owner``."""
    near = nearest(name, names)
    return ConfigError(f"{name}={shown(value)} is not a setting of {owner}; {near or 'leave it out'}")


def nearest(name: str, names: Iterable[str]) -> str:
    """``the nearest one is NAME`` for the one of ``names`` that is spelt almost like ``name``; empty without one."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=MIN_SIMILARITY)
    return f"the nearest one is {near[0]}" if near else ""


def faults_of(cls: type[Any], values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each of ``values`` on its own, for fields of ``cls``."""
    faults = []
    for name, value in values.items():
        about = describe(cls)[name].about
        try:
            if not about.ignored:
                cls(**{name: value})
        except ConfigError as error:
            faults.append(str(error))
    return faults


def from_environment(name: str) -> dict[str, str]:
    """The setting ``name`` as the environment's ``JAXDEPLOY_NAME`` has it; nothing where that is not set."""
    value = os.environ.get(f"JAXDEPLOY_{name.upper()}")
    return {} if value is None else {name: value}


def checked(cls: type[Any], name: str, value: Any) -> Any:
    """``value`` for the field ``name`` of ``cls``, as it will be kept. Raises ``ConfigError``."""
    default, about, kind, is_list = describe(cls)[name]
    if value is None and default is None:
        return None
    if about.secret:
        _check_secret(name, value)
    if isinstance(about.reads, Mapping):
        value = about.reads.get(value, value) if isinstance(value, str) else value
    elif about.reads is not None:
        value = about.reads(value)
    value = _as_list(name, kind, value) if is_list else _as_kind(name, kind, value, value)
    _check_rule(name, about, value)
    return value


def parse_text(cls: type[Any], name: str, text: str) -> Any:
    """The value that ``text``, from a command line, means for the field ``name``. Raises ``ConfigError``."""
    _, about, kind, _ = describe(cls)[name]
    if isinstance(about.reads, Mapping) and text in about.reads:
        return about.reads[text]
    if kind is bool and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    return _number(text) if kind in (int, float) else text


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, ``-`` in keys read as ``_``. Raises ``ConfigError``."""
    import yaml

    try:
        text = read_text(Path(path), _MAX_YAML_SIZE)
        if _flow_depth(text) > _MAX_YAML_DEPTH:
            raise ConfigError(f"config={path!r} nests more than {_MAX_YAML_DEPTH} lists and mappings; mend the file")
        content = yaml.safe_load(text) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"config={path!r} cannot be read ({error.strerror}); name a YAML file") from None
    except CheckpointError as error:
        raise ConfigError(f"config={path!r} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config={path!r} is not YAML ({' '.join(str(error).split())}); mend the file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config={path!r} must hold `name: value` lines; mend the file")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _flow_depth(text: str) -> int:
    """How deeply brackets are nested, at most; the parser's time grows with the square of it."""
    steps = [1 if letter in "[{" else -1 for letter in text if letter in "[]{}"]
    return max(itertools.accumulate(steps), default=0)


def _naming_the_unknown(init: Callable[..., None], cls: type[Any]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked_init(self: Any, /, *args: Any, **kwargs: Any) -> None:
        known = describe(cls)
        for name, value in kwargs.items():
            if name not in known:
                raise unknown_setting(name, value, known, cls.__name__)
            target = known[name].about.alias
            if target in kwargs and not _is_zero(value):
                raise ConfigError(f"{name}={shown(value)} is another name of {target}; give one of the two")
        init(self, *args, **kwargs)

    return checked_init


def _assign(self: Any, name: str, value: Any) -> None:
    cls = type(self)
    known = describe(cls)
    if name not in known:
        raise unknown_setting(name, value, known, cls.__name__)
    about = known[name].about
    if about.live:
        object.__setattr__(self, name, checked(cls, name, value))
    elif value is None:
        return
    elif about.ignored:
        logger.warning("%s=%s has no meaning here: %s", name, shown(value), about.ignored)
    elif about.missing:
        if not (type(value) in _PLAIN and value in (*_EMPTY, *about.fine)):
            raise ConfigError(f"{name}={shown(value)} is not there yet; {about.missing}")
    elif not _is_zero(value):
        setattr(self, about.alias, value)


def _is_zero(value: Any) -> bool:
    """Whether ``value`` leaves the field alone that it is given for by another name."""
    return value is None or (isinstance(value, int | float) and value == 0)


def _type_of(hint: Any) -> tuple[type[Any], bool]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    first = next(option for option in options if option is not types.NoneType)
    origin = typing.get_origin(first) or first
    return (typing.get_args(first)[0], True) if origin is list else (origin, False)


def _check_secret(name: str, value: Any) -> None:
    keys = value if isinstance(value, list | tuple) else [value]
    if not keys or not all(isinstance(key, str) and key and key == key.strip() and key.isprintable() for key in keys):
        raise ConfigError(
            f"{name}: a key must be a text of letters and signs, neither empty nor blank at an end; set it, or leave "
            f"{name} out"
        )


def _as_list(name: str, kind: type[Any], value: Any) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    return [_as_kind(name, kind, item, value) for item in values]


def _as_kind(name: str, kind: type[Any], value: Any, given: Any) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and _is_number(value):
        number = _plain_number(value)
        if -_MAX_NUMBER < number < _MAX_NUMBER and (kind is float or number == int(number)):
            return number if kind is float else int(number)
    elif kind not in (bool, int, float) and isinstance(value, kind):
        return value
    raise ConfigError(
        f"{name}={shown(given)} must be {_TYPE_WORDS.get(kind, kind.__name__)}; correct it or leave it out"
    )


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a real number of any library, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain_number(value: numbers.Real) -> int | float:
    """``value`` as Python's own type, also from NumPy's; infinity where no float is large enough."""
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_rule(name: str, about: Setting, value: Any) -> None:
    if about.choices and value not in about.choices:
        names = ", ".join(str(choice) for choice in about.choices)
        raise ConfigError(f"{name}={shown(value)} is not one of {names}; {about.advice or 'take one of these'}")
    if about.rule is not None and not about.rule.holds(value):
        raise ConfigError(f"{name}={shown(value)} {about.rule.text}; {about.advice or 'correct it or leave it out'}")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
