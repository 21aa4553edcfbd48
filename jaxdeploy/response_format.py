"""What form a reply is to have: a ``response_format`` becomes a grammar that the engine follows.

JSON Schema, regular expressions and Lark grammars are llguidance's; what it cannot follow to the letter is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar_process import TOO_MUCH, ask, start

LARGEST = 256 * 1024
"""Characters of a grammar or schema."""

SMALL = 4096
"""Characters of a grammar that is too short to overflow the stack of the library."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of a JSON text: enough to lay it out, not enough to go on for ever, as small models like to."""

FORMS = "text, json_object, json_schema, regex_schema, choice or grammar"


def grammar_of(response_format: Mapping[str, Any] | None) -> str | None:
    """Llguidance's form of the grammar, checked; ``None`` where any text will do.

    ``{"type": "json_object"}``; ``{"type": "json_schema", "json_schema": {"schema": {...}}}`` (OpenAI);
    ``{"type": "regex_schema", "regex_schema": "..."}`` (LMDeploy); ``{"type": "choice", "choice": ["yes", "no"]}``;
    ``{"type": "grammar", "grammar": "start: ..."}`` (Lark, or GBNF).

    Raises:
        RequestError: it has none of these forms, is too large, or uses what cannot be followed.
    """
    grammar = grammar_text(response_format)
    if grammar is None:
        return None
    if len(grammar) > SMALL:
        return _checked_apart(json.dumps(response_format))
    check(grammar)
    return grammar


def grammar_text(response_format: Mapping[str, Any] | None) -> str | None:
    """The same, before the library has seen the grammar. Raises ``RequestError`` for its form and its size."""
    if response_format is None or response_format.get("type") == "text":
        return None
    made = _made(response_format)
    if len(made) > LARGEST:
        raise RequestError(f"response_format of {len(made)} characters is larger than {LARGEST}; simplify it")
    return made


def check(grammar: str) -> None:
    """Have the library read ``grammar``, in this process. Raises ``RequestError`` for what it cannot follow."""
    from llguidance import LLMatcher

    fault = LLMatcher.validate_grammar(grammar)
    if fault and not fault.startswith("WARNING"):
        raise RequestError(f"response_format cannot be followed: {_first_line(fault)}; leave that out")


@lru_cache(16)
def _checked_apart(job: str) -> str | None:
    """The grammar of a format, checked in a process of its own, since the library may crash."""
    try:
        with start() as worker:
            answer = ask(worker, job.encode())
    except (OSError, EOFError):
        raise RequestError(TOO_MUCH) from None
    if "fault" in answer:
        raise RequestError(str(answer["fault"]))
    return answer["grammar"]


def _made(response_format: Mapping[str, Any]) -> str:
    from llguidance import grammar_from

    kind = response_format.get("type")
    try:
        if kind == "json_object":
            return _json('{"type": "object"}')
        if kind == "json_schema":
            return _json(_schema(response_format.get("json_schema")))
        if kind == "regex_schema":
            return grammar_from("regex", _text(response_format, "regex_schema"))
        if kind == "choice":
            return grammar_from("choice", _choice(response_format.get("choice")))
        if kind == "grammar":
            return grammar_from("grammar", _text(response_format, "grammar"))
    except RequestError:
        raise
    except Exception as error:  # whatever a parser of strangers' texts may raise
        raise RequestError(f"response_format cannot be read ({_first_line(str(error))}); mend it") from error
    raise RequestError(f"response_format.type={kind!r:.60} is unknown; give {FORMS}")


def _json(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


def _schema(given: Any) -> str:
    """The schema alone: OpenAI wraps it, LMDeploy may not."""
    schema = given.get("schema", given) if isinstance(given, Mapping) else given
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"response_format.json_schema={given!r:.60} holds no schema; give a JSON Schema object")
    return json.dumps(schema)


def _choice(given: Any) -> str:
    if not isinstance(given, list) or not given or not all(isinstance(item, str) and item for item in given):
        raise RequestError(f"response_format.choice={given!r:.60} must be a list of texts; give some")
    return json.dumps(given)


def _text(response_format: Mapping[str, Any], name: str) -> str:
    value = response_format.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"response_format.{name}={value!r:.60} must be a text; give one")
    return value


def _first_line(fault: str) -> str:
    return next(iter(fault.strip().splitlines()), "no reason given")
