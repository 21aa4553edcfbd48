"""Checks the model list of a node before the proxy repeats it."""

from __future__ import annotations

import math
from typing import Any

from jaxdeploy.server.errors import BadAnswerError
from jaxdeploy.server.proxy.fetching import read_json
from jaxdeploy.server.proxy.nodes import clipped

MAX_MODELS = 1000
"""Models and adapters of a node."""
MAX_FIELDS = 32
MAX_NAME = 256
MAX_TEXT_LENGTH = 1024
"""Characters."""
LARGEST = 2**53
"""Whole numbers up to this one are exact in every JSON parser."""
YEAR_10000 = 253402300800
"""In seconds since 1970: the first one that is not a date."""

Card = dict[str, Any]


def read_cards(body: bytes) -> dict[str, Card]:
    """Return model name → card in ``/v1/models``, without members that are objects or lists.

    Raises ``BadAnswerError`` if the answer is not a list of models.
    """
    try:
        listed = read_json(body)["data"]
    except (ValueError, TypeError, KeyError):
        raise BadAnswerError("/v1/models answers 200 and no list of models") from None
    if not isinstance(listed, list):
        raise BadAnswerError("/v1/models answers 200 and no list of models")
    if len(listed) > MAX_MODELS:
        raise BadAnswerError(f"/v1/models lists {len(listed)} models; a node may have {MAX_MODELS}")
    cards = [_checked(card) for card in listed]
    return {card["id"]: card for card in cards}


def _checked(card: Any) -> Card:
    if not isinstance(card, dict) or len(card) > MAX_FIELDS:
        raise BadAnswerError(f"/v1/models lists a model that is no object of at most {MAX_FIELDS} members")
    name = card.get("id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise BadAnswerError(f"/v1/models lists a model whose id is no text of 1 to {MAX_NAME} characters")
    for member, value in card.items():
        if not _printable(member) or not _scalar(value):
            raise BadAnswerError(f"/v1/models has {clipped(member)}={_shown(value)} in {clipped(name)}")
    created = card.get("created")
    if created is not None and not _is_time(created):
        raise BadAnswerError(f"/v1/models has created={_shown(created)} in {clipped(name)}, which is no time")
    kept = {member: value for member, value in card.items() if not isinstance(value, dict | list)}
    return kept if created is None else {**kept, "created": int(created)}


def _scalar(value: Any) -> bool:
    """Whether it can be repeated; objects and lists pass because they are left out."""
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) <= LARGEST


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < YEAR_10000


def _printable(text: str) -> bool:
    return len(text) <= MAX_TEXT_LENGTH and text.isprintable()


def _shown(value: Any) -> str:
    return clipped(repr(value)[:80])
