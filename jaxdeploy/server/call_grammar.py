"""A grammar of nothing but calls, for requests that want one made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxdeploy.tokenizer import Tokenizer


def call_grammar(form: ModuleType, functions: Mapping[str, Any], tokenizer: Tokenizer, *, several: bool) -> str:
    """Lark, with llguidance's additions, for one call of ``functions`` (name → JSON Schema), or ``several``."""
    schemas = [_call(form, name, schema) for name, schema in functions.items()]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    begin, between, end = (_literal(text, tokenizer) for text in (form.BEGIN, form.BETWEEN, form.END))
    more = f" ({between} call)*" if several else ""
    schema = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}, **schema}
    return f"start: {begin} call{more} {end}\ncall: %json {json.dumps(schema)}\n"


def _call(form: ModuleType, name: str, schema: Any) -> dict[str, Any]:
    parts = {"name": {"const": name}, form.ARGUMENTS: schema or {"type": "object"}}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """``text`` in Lark; special tokens by their ids, for they are more than their letters."""
    parts = re.split(r"(<\|.*?\|>|\[[A-Z_]+\])", text)
    ids = [tokenizer.token_to_id(part) for part in parts]
    return " ".join(
        f"<[{token_id}]>" if token_id in tokenizer.special_ids else json.dumps(part)
        for part, token_id in zip(parts, ids, strict=True)
        if part
    )
