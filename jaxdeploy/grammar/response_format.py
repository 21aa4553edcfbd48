"""What form a reply is to have: a ``response_format`` becomes a grammar that the engine follows.

JSON Schema, regular expressions and Lark grammars are llguidance's; what it cannot follow to the letter is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.process import TOO_MUCH, ask, start

LARGEST = 256 * 1024
"""Characters of a grammar or schema."""

SMALL = 4096
"""Characters of a grammar that is too short to overflow the stack of the library."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}|\x20?(\x0D?\x0A){1,2}[\x20\x09]{0,128}"
"""Between the parts of a JSON text: at most 20 characters, or a line's end and the indentation of the next line, four
spaces for each of 32 levels. Without a limit, small models can write spaces until their reply is cut off."""

MEMBERS = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "regex_schema": ("regex_schema",),
    "choice": ("choice",),
    "grammar": ("grammar", "tools"),
}
"""Type of a form → its members next to the type. ``tools`` are the schemas that the server made a grammar from."""

WRAPPER = frozenset({"name", "description", "schema", "strict"})
"""Members of OpenAI's ``json_schema``."""

FORMS = "text, json_object, json_schema, regex_schema, choice or grammar"


def grammar_of(response_format: Mapping[str, Any] | None) -> str | None:
    """Llguidance's form of the grammar, checked; ``None`` where any text will do.

    ``{"type": "json_object"}``, with ``"schema": {...}`` as llama.cpp and Together have it;
    ``{"type": "json_schema", "json_schema": {"schema": {...}}}`` (OpenAI), or ``"schema": {...}`` beside the type;
    ``{"type": "regex_schema", "regex_schema": "..."}`` (LMDeploy); ``{"type": "choice", "choice": ["yes", "no"]}``;
    ``{"type": "grammar", "grammar": "start: ..."}`` (Lark, or GBNF).

    Raises:
        RequestError: it has none of these forms or an unknown member, is too large, or cannot be followed.
    """
    grammar = grammar_text(response_format)
    if grammar is None:
        return None
    if len(grammar) > SMALL:
        return _checked_apart(json.dumps(response_format))
    check(grammar, response_format or {})
    return grammar


def grammar_text(response_format: Mapping[str, Any] | None) -> str | None:
    """The same, before the library has seen the grammar. Raises ``RequestError`` for its form and its size."""
    if not response_format:
        return None
    response_format = _checked_members(response_format)
    if response_format["type"] == "text":
        return None
    made = _made(response_format)
    if len(made) > LARGEST:
        raise RequestError(f"response_format of {len(made)} characters is larger than {LARGEST}; simplify it")
    return made


def check(grammar: str, asked: Mapping[str, Any]) -> None:
    """Have the library read the ``grammar`` of ``asked``, in this process. Raises ``RequestError`` if it cannot."""
    from llguidance import LLMatcher

    fault = LLMatcher.validate_grammar(grammar)
    if fault and not fault.startswith("WARNING"):
        name = "tools" if "tools" in asked else "response_format"
        raise RequestError(f"{name} cannot be followed: {_cause(fault, asked.get('tools', asked))}; leave that out")


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


def nested_form(form: Mapping[str, Any]) -> dict[str, Any]:
    """A ``response_format`` from a form that has name and schema next to the type."""
    if form.get("type") != "json_schema":
        return dict(form)
    return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}


def _cause(fault: str, asked: Any) -> str:
    """What llguidance complains of, in one line; for a regular expression the keyword of ``asked`` that has it."""
    found = re.search(r"regex parse error:\s*\n +(.*)\n[\s\S]*?error: (.*)", fault)
    if found is None:
        return next(iter(fault.strip().splitlines()), "no reason given")
    pattern, cause = found.groups()
    keyword = next(_keywords_with(asked, pattern), "the regular expression")
    return f"{keyword}={pattern!r:.120}: {cause}"


def _keywords_with(value: Any, pattern: str, place: str = "") -> Iterator[str]:
    """Paths to the members of ``value`` that are ``pattern``, or have it as their name."""
    if isinstance(value, Mapping):
        for name, member in value.items():
            if name == pattern:
                yield place
            yield from _keywords_with(member, pattern, f"{place}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _keywords_with(member, pattern, f"{place}[{index}]")
    elif value == pattern:
        yield place


def _checked_members(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """The members that say something. Raises ``RequestError`` for an unknown type or member."""
    said = {name: value for name, value in response_format.items() if value is not None}
    kind = said.get("type")
    if not isinstance(kind, str) or kind not in MEMBERS:
        raise RequestError(f"response_format.type={kind!r:.60} is unknown; give {FORMS}")
    for name, value in said.items():
        if name != "type" and name not in MEMBERS[kind] and value not in ("", [], {}):
            raise RequestError(f"response_format.{name} is no member of type={kind!r}; leave it out")
    return said


def _made(response_format: Mapping[str, Any]) -> str:
    from llguidance import grammar_from

    kind = response_format.get("type")
    try:
        if kind == "json_object":
            return _json(_schema("schema", response_format.get("schema", {"type": "object"})))
        if kind == "json_schema" and "schema" in response_format:
            return _json(_schema("schema", response_format["schema"]))
        if kind == "json_schema":
            return _json(_schema("json_schema", _unwrapped(response_format.get("json_schema"))))
        if kind == "regex_schema":
            return grammar_from("regex", _text(response_format, "regex_schema"))
        if kind == "choice":
            return grammar_from("choice", _choice(response_format.get("choice")))
        if kind == "grammar":
            return grammar_from("grammar", _text(response_format, "grammar"))
    except RequestError:
        raise
    except Exception as error:  # whatever a parser of strangers' texts may raise
        raise RequestError(f"response_format cannot be read ({_cause(str(error), None)}); mend it") from error
    raise AssertionError(f"{kind} is in MEMBERS and has no grammar")


def _json(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


def _unwrapped(given: Any) -> Any:
    """The schema alone: OpenAI wraps it, LMDeploy may not."""
    if not isinstance(given, Mapping) or ("schema" not in given and not {"name", "strict"} & given.keys()):
        return given
    for name in given:
        if name not in WRAPPER:
            raise RequestError(f"response_format.json_schema.{name} is no member beside the schema; leave it out")
    return given.get("schema")


def _schema(name: str, schema: Any) -> str:
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"response_format.{name}={schema!r:.60} holds no schema; give a JSON Schema object")
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
