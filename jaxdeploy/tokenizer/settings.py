"""What a checkpoint says about its tokenizer beside the vocabulary itself: plain JSON, read as data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files import stored
from jaxdeploy.files.fields import StoredFields, is_whole
from jaxdeploy.files.stored import shown

DEFAULT = "default"
"""Name of the chat template that is used without tools."""
MAX_TEMPLATES = 64
"""Beside the default one."""
CONFIG = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
MAX_ID = 2**24
"""More than any vocabulary has tokens."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ID = re.compile("[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True)
class AddedToken:
    """A token that is kept whole in texts. ``special``: no text, but a sign to the model.

    ``lstrip``/``rstrip``: white space on that side of the token in a text belongs to it.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Settings:
    """The options of a tokenizer; None or empty where the checkpoint is silent.

    ``added`` overrides the vocabulary by id. ``named`` maps ``bos_token``, ``eos_token`` … to their texts.
    ``fallback_ids`` are the same names' ids out of ``generation_config.json`` and ``config.json``.
    ``legacy``: sentencepiece puts its leading space after every special token, not only where a text begins.
    ``chat_templates``: name → Jinja source; the only one of a checkpoint is named ``default``.
    """

    added: tuple[AddedToken, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    special_texts: frozenset[str] = frozenset()
    fallback_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    legacy: bool = True
    tokenizer_class: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def read_settings(folder: Path) -> Settings:
    """Gather ``tokenizer_config.json`` and its older companions; all of them are optional.

    Raises:
        CheckpointError: a file is there and is not a JSON object, or a field has another type than it should.
    """
    config = read_json(folder / CONFIG)
    stored = StoredFields(config, CONFIG)
    specials = {**read_json(folder / SPECIALS), **config}
    named = {name: text for name in NAMED_TOKENS if (text := _named_text(specials, name)) is not None}
    return Settings(
        added=tuple({token.id: token for token in _added_tokens(folder, stored)}.values()),
        named=named,
        special_texts=frozenset([*named.values(), *_extra_specials(specials)]),
        fallback_ids=_fallback_ids(folder),
        add_bos=stored.flag("add_bos_token", None),
        add_eos=stored.flag("add_eos_token", None),
        legacy=stored.flag("legacy", True),
        tokenizer_class=stored.text("tokenizer_class", None),
        chat_templates=_chat_templates(folder, config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        CheckpointError: the file cannot be read as a JSON object.
    """
    return stored.read_json(path) if stored.exists(path) else {}


def _text(token: Any) -> str | None:
    """A token is written as its text, or as an object with the text under ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_text(specials: Mapping[str, Any], name: str) -> str | None:
    """The text of the token that a field names. Raises ``CheckpointError``: the field holds something else."""
    token = specials.get(name)
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str | None):
        file = f"{CONFIG} or {SPECIALS}"
        raise StoredFields(specials, file).fault(name, "must be a text, or an object with a text as content")
    return text or None


def _added_tokens(folder: Path, stored: StoredFields) -> Iterator[AddedToken]:
    """``added_tokens.json`` first, so that the newer ``added_tokens_decoder`` wins where both name an id."""
    older = StoredFields(read_json(folder / "added_tokens.json"), "added_tokens.json")
    for content in older.values:
        token_id = older.whole(content, None, least=0, most=MAX_ID)
        if token_id is not None:
            yield AddedToken(content, token_id, special=False)
    for name, token in stored.nested("added_tokens_decoder").values.items():
        yield _added_token(folder, name, token)


def _added_token(folder: Path, token_id: str, token: Any) -> AddedToken:
    content = _text(token)
    if content is None or not _ID.fullmatch(token_id) or int(token_id) > MAX_ID:
        fault = f"added_tokens_decoder[{shown(token_id)}]={shown(token)} must map an id to an object with its content"
        raise CheckpointError(f"{folder / CONFIG}: {fault}; download or copy the file again")
    flags = token if isinstance(token, Mapping) else {}
    special, lstrip, rstrip = (bool(flags.get(name)) for name in ("special", "lstrip", "rstrip"))
    return AddedToken(content, int(token_id), special=special, lstrip=lstrip, rstrip=rstrip)


def _extra_specials(specials: Mapping[str, Any]) -> Iterator[str]:
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = specials.get(name) or ()
        if not isinstance(tokens, list | Mapping | tuple):
            raise StoredFields(specials, f"{CONFIG} or {SPECIALS}").fault(name, "must be a list or an object of tokens")
        for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
            if (text := _text(token)) is not None:
                yield text


def _fallback_ids(folder: Path) -> dict[str, int]:
    """A list of ids (several end tokens) stands for its first one."""
    found: dict[str, int] = {}
    for file in ("config.json", "generation_config.json"):
        config = read_json(folder / file)
        for name in ("bos_token", "eos_token"):
            value = config.get(f"{name}_id")
            first: Any = value[0] if isinstance(value, list) and value else value
            if is_whole(first) and 0 <= first <= MAX_ID:
                found[name] = int(first)
    return found


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates that transformers would find.

    ``chat_template.jinja`` and ``additional_chat_templates/`` come first, then ``tokenizer_config.json``, then the file
    in which processors keep theirs.
    """
    files = {DEFAULT: folder / "chat_template.jinja"}
    more = folder / "additional_chat_templates"
    if stored.is_folder(more):
        files |= {path.stem: path for path in sorted(more.glob("*.jinja"))[:MAX_TEMPLATES]}
    found = {name: stored.read_text(path) for name, path in files.items() if stored.exists(path)}
    if found:
        return found
    for file, content in (("tokenizer_config.json", config), ("chat_template.json", None)):
        content = read_json(folder / file) if content is None else content
        if content.get("chat_template"):
            return _named_templates(folder / file, content["chat_template"])
    return {}


def _named_templates(path: Path, given: Any) -> dict[str, str]:
    """One template as a text, or several as a list of ``name`` and ``template`` or as an object."""
    pairs: list[tuple[Any, Any]] = [(DEFAULT, given)]
    if isinstance(given, Mapping):
        pairs = list(given.items())
    if isinstance(given, list):
        pairs = [
            (item.get("name"), item.get("template")) if isinstance(item, Mapping) else ("", None) for item in given
        ]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        fault = f"chat_template={shown(given)} must be a text, or a list of objects with name and template"
        raise CheckpointError(f"{path}: {fault}; download or copy the file again")
    return dict(pairs)
