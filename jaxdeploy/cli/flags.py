"""Command-line flags and YAML keys, made from the settings classes of ``jaxdeploy.config``."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NoReturn, TypeAlias, TypeVar

from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import Described, describe, faults_of, nearest, parse_text, read_yaml, unknown_setting

T = TypeVar("T")
Namespace: TypeAlias = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """Takes ``_`` for ``-`` in flags, and raises its complaints as ``ConfigError`` instead of leaving the program."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def read(self, argv: Sequence[str]) -> Namespace:
        """The flags that were given. Raises ``ConfigError``, naming the nearest flag for one that is unknown."""
        found, unknown = self.parse_known_args([_with_dashes(arg) for arg in argv])
        if unknown:
            raise ConfigError(self._complaint(unknown[0]))
        return found

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say."""
        raise ConfigError(f"{message}; `{self.prog} --help` shows what is accepted")

    def _complaint(self, arg: str) -> str:
        if not arg.startswith("-"):
            return f"argument={arg!r} is one too many; put quotes around texts with spaces"
        near = nearest(arg.split("=")[0], self._option_string_actions)
        return "; ".join(filter(None, [f"flag={arg!r} is unknown", near, f"`{self.prog} --help` lists them"]))


def add_settings(parser: Parser, *classes: type[Any]) -> None:
    """One flag for every setting of ``classes``. Only those that are given appear among the parsed arguments."""
    for cls in classes:
        group = parser.add_argument_group(_first_line(cls).rstrip("."))
        for name, described in describe(cls).items():
            if described.about.flag:
                _add_flag(group, name, described)


def read_settings(args: Namespace, *classes: type[Any], skipped: Collection[str] = ()) -> list[dict[str, Any]]:
    """The settings that were given, for each class: those of the file ``--config`` under those of the command line.

    ``skipped`` are keys of the file that the command reads itself.

    Raises:
        ConfigError: the file cannot be read, or it has keys that are no flags of the command, or wrong values. All
            faults of the file are listed.
    """
    given = vars(args)
    path = given.get("config")
    from_file = {} if path is None else {_field_name(key): value for key, value in read_yaml(path).items()}
    faults = _faults(from_file, classes, str(path), skipped)
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError(
            "\n".join([f"config={path!r} has {len(faults)} faults; correct them", *map("  ".__add__, faults)])
        )
    return [_of_class(cls, given, from_file) for cls in classes]


def _faults(from_file: dict[str, Any], classes: Sequence[type[Any]], path: str, skipped: Collection[str]) -> list[str]:
    """Everything that is wrong in a file."""
    owners = {name: cls for cls in classes for name in _flag_names(cls)}
    faults = []
    for name, value in from_file.items():
        if name in skipped:
            continue
        if name not in owners:
            faults.append(str(unknown_setting(name, value, owners, path)))
        elif value is None and describe(owners[name])[name].about.secret:
            faults.append(f"{name} has no value in {path}; write a key, or leave the line out")
        else:
            faults += faults_of(owners[name], {name: value})
    return faults


def _of_class(cls: type[Any], given: dict[str, Any], from_file: dict[str, Any]) -> dict[str, Any]:
    names = _flag_names(cls)
    under = {name: value for name, value in from_file.items() if name in names}
    over = {name: _parsed(cls, name, given[name]) for name in names if name in given}
    return {**under, **over}


def _parsed(cls: type[Any], name: str, value: Any) -> Any:
    if isinstance(value, str):
        return parse_text(cls, name, value)
    return [parse_text(cls, name, item) for item in value] if isinstance(value, list) else value


def _add_flag(group: Any, name: str, described: Described) -> None:
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(described)}
    if described.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = _metavar(described)
    if described.is_list or described.kind is dict:
        options["nargs"] = "+"
    group.add_argument(f"--{name.rstrip('_').replace('_', '-')}", **options)


def _help(described: Described) -> str:
    default, about = described.default, described.about
    if not about.live:
        return argparse.SUPPRESS
    if default is None:
        return about.help.replace("%", "%%")
    shown = str(default).lower() if isinstance(default, bool) else default
    return f"{about.help} (default: {shown})".replace("%", "%%")


def _metavar(described: Described) -> str:
    choices = described.about.choices
    if len(choices) > 1:
        return "{" + ",".join(str(choice) for choice in choices) + "}"
    return {int: "N", float: "X", dict: "NAME=PATH"}.get(described.kind, "TEXT")


def _flag_names(cls: type[Any]) -> list[str]:
    return [name for name, described in describe(cls).items() if described.about.flag]


def _field_name(key: str) -> str:
    return "async_" if key == "async" else key


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or cls.__name__).splitlines()[0]


def _with_dashes(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg
