"""How the server's log reads: a line for people, or an object for machines."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from jaxdeploy.errors import ConfigError

FIELDS = ("request_id", "status", "seconds")
"""What a line may have beside its text."""

current_request: ContextVar[str] = ContextVar("current_request")
"""Id of the request that the running task handles; lines that are logged meanwhile get it."""


class TextFormat(logging.Formatter):
    """``2026-11-29 12:00:00 INFO text request_id=…``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, D102
        rest = [f"{name}={value}" for name, value in _fields(record).items()]
        return _printable(" ".join([super().formatMessage(record), *rest]))

    def formatException(self, ei: Any) -> str:  # noqa: N802, D102
        return textwrap.indent(super().formatException(ei), "    ", lambda _: True)


class JsonFormat(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(level: str, form: str) -> None:
    """Write the log to stderr. Raises ``ConfigError`` for a level that there is not."""
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        raise ConfigError(f"log_level={level!r} is not one of DEBUG, INFO, WARNING, ERROR; take one of these")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormat() if form == "json" else TextFormat())
    handler.addFilter(name_request)
    for name in ("jaxdeploy", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(names[level.upper()] if name == "jaxdeploy" else max(names[level.upper()], logging.WARNING))


def name_request(record: logging.LogRecord) -> bool:
    """Give ``record`` the id of the current request, unless it has one. A filter that keeps every record."""
    request_id = current_request.get(None)
    if request_id is not None and not hasattr(record, "request_id"):
        record.request_id = request_id
    return True


def _printable(text: str) -> str:
    r"""``text`` in one line: what is no letter, digit, sign or space is written as ``\n``, ``\x1b``, ``\u2028`` …"""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: vars(record)[name] for name in FIELDS if name in vars(record)}
