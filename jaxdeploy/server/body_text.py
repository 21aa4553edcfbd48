"""Request bodies as UTF-8 text: lone surrogates become U+FFFD before a route reads the JSON."""

from __future__ import annotations

import json
import re

ESCAPES = re.compile(
    rb"\\u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair: one character
    rb"|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\."  # any other escape, among them the escaped backslash of \\ud83d
)


def well_formed_body(body: bytes) -> bytes:
    r"""Return a JSON text in UTF-8 whose strings are all well-formed; ``body`` is in any encoding of JSON.

    JSON can name half of a surrogate pair (``\ud83d``), and ``json.loads`` accepts it. Such a string has no UTF-8
    form: tokenizers, grammars and replies would fail on it later.
    """
    encoding = json.detect_encoding(body)
    try:
        body.decode()
        is_utf8 = encoding == "utf-8"
    except UnicodeDecodeError:
        is_utf8 = False
    if not is_utf8:
        body = body.decode(encoding, "replace").encode()
    if b"\\ud" in body or b"\\uD" in body:
        return ESCAPES.sub(lambda found: rb"\ufffd" if found["lone"] else found[0], body)
    return body
