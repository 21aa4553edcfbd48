"""A grammar of nothing but calls, for requests that want one made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxdeploy.tokenizer import Tokenizer

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How models write the JSON of calls."""


def call_grammar(form: ModuleType, functions: Mapping[str, Any], tokenizer: Tokenizer, *, several: bool) -> str:
    """Lark, with llguidance's additions, for one call of ``functions`` (name → JSON Schema), or ``several``.

    The arguments of each function are a grammar of their own, so ``#`` in their schema is the schema itself.
    """
    begin, between, end = (_literal(text, tokenizer) for text in (form.BEGIN, form.BETWEEN, form.END))
    more = f" ({between} call)*" if several else ""
    calls, arguments = [], []
    for index, (name, schema) in enumerate(functions.items()):
        opening = f'{{"name": {json.dumps(name)}, "{form.ARGUMENTS}": '
        calls.append(f'{json.dumps(opening)} arguments_{index} "}}"')
        arguments.append(f"arguments_{index}: %json {_arguments(schema)}\n")
    return f"start: {begin} call{more} {end}\ncall: {' | '.join(calls)}\n{''.join(arguments)}"


def _arguments(schema: Any) -> str:
    return json.dumps({**(schema or {"type": "object"}), "x-guidance": LAYOUT})


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """``text`` in Lark; special tokens by their ids, for they are more than their letters."""
    parts = re.split(r"(<\|.*?\|>|\[[A-Z_]+\])", text)
    ids = [tokenizer.token_to_id(part) for part in parts]
    return " ".join(
        f"<[{token_id}]>" if token_id in tokenizer.special_ids else json.dumps(part)
        for part, token_id in zip(parts, ids, strict=True)
        if part
    )
