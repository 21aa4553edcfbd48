"""Write docs/cli.md from the commands' own flags: ``python scripts/write_cli_docs.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxdeploy.cli import COMMANDS, command_parser
from jaxdeploy.files.atomic import put_text

TARGET = Path(__file__).resolve().parents[1] / "docs/cli.md"
INTRODUCTION = """\
# Commands

Made by `scripts/write_cli_docs.py` from the flags themselves; do not edit. `python -m jaxdeploy` is `jaxdeploy`.
Flags may be written with `_` for `-`. Keys of a `--config` file are the names of the flags. A bad value is one line on
stderr and exit code 2; Ctrl-C is exit code 130. A running server ends with 0.

"""


def render() -> str:
    """The whole page."""
    return INTRODUCTION + "\n".join(_section(name) for name in COMMANDS)


def _section(name: str) -> str:
    parser = command_parser(name)
    parts = [f"## jaxdeploy {name}\n\n{COMMANDS[name].help[0].upper()}{COMMANDS[name].help[1:]}.\n"]
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if _shown(action)]
        if rows:
            parts.append("\n".join([f"**{_title(group)}**\n", "| flag | meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _title(group: argparse._ArgumentGroup) -> str:
    return {"positional arguments": "Arguments", "options": "Flags"}.get(group.title or "", group.title or "")


def _shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS and action.dest != "help"


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
    value = f" `{action.metavar}`" if action.option_strings and action.metavar else ""
    meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| {names}{value} | {meaning} |"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    put_text(TARGET, render())
