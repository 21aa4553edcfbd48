"""Reads generation settings from a checkpoint's JSON files and checks them by the rules of ``GenerationConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.files.fields import StoredFields, is_whole
from jaxdeploy.files.stored import exists, read_json
from jaxdeploy.settings import checked

FILE = "generation_config.json"
FIELDS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "min_new_tokens",
)
"""Fields of the file that are used, under the same names as in ``GenerationConfig``."""

_LARGEST_ID = 2**31 - 1


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """Return the fields of ``generation_config.json`` that are used; empty without a file.

    ``eos_token_id`` is a list of ids, ``stop_words`` has the file's ``stop_strings``. Absent and null fields are left
    out.

    Raises ``CheckpointError`` that lists every field which breaks a rule of ``GenerationConfig``.
    """
    path = folder / FILE
    return checked_defaults(read_json(path)) if exists(path) else {}


def checked_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``generation_config.json``, checked. Raises as ``read_generation_defaults``."""
    given: dict[str, Any] = {name: found[name] for name in FIELDS if found.get(name) is not None}
    if found.get("stop_strings") is not None:
        given["stop_words"] = found["stop_strings"]
    defaults, faults = {}, []
    for name, value in given.items():
        try:
            defaults[name] = checked(GenerationConfig, name, value)
        except ConfigError as error:
            stored = "stop_strings" if name == "stop_words" else name
            faults.append(f"{FILE}: {str(error).replace(name, stored, 1)}")
    try:
        if ends := token_ids(found, FILE):
            defaults["eos_token_id"] = ends
    except CheckpointError as error:
        faults.append(str(error))
    if len(faults) == 1:
        raise CheckpointError(faults[0])
    if faults:
        raise CheckpointError.collect(f"{FILE} has values that cannot be used:", faults)
    return defaults


def token_ids(found: Mapping[str, Any], file: str) -> list[int]:
    """Return the ids in the ``eos_token_id`` of a JSON file, which is one id, a list of ids, or absent.

    Some files write -1 for no token; it is left out. Raises ``CheckpointError``: another value.
    """
    name = "eos_token_id"
    value = found.get(name)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(is_whole(token) and -1 <= token <= _LARGEST_ID for token in ids):
        raise StoredFields(found, file).fault(name, "must be a token id or a list of token ids")
    return [int(token) for token in ids if token != -1]
