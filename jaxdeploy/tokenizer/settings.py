"""What a checkpoint says about its tokenizer beside the vocabulary itself: plain JSON, read as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError

DEFAULT = "default"
"""Name of the chat template that is used without tools."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
        CheckpointError: a file is there and is not a JSON object.
    """
    config = read_json(folder / "tokenizer_config.json")
    specials = {**read_json(folder / "special_tokens_map.json"), **config}
    named = {name: text for name in NAMED_TOKENS if (text := _text(specials.get(name))) is not None}
    return Settings(
        added=tuple({token.id: token for token in _added_tokens(folder, config)}.values()),
        named=named,
        special_texts=frozenset([*named.values(), *_extra_specials(specials)]),
        fallback_ids=_fallback_ids(folder),
        add_bos=_flag(config, "add_bos_token"),
        add_eos=_flag(config, "add_eos_token"),
        legacy=config.get("legacy") is not False,
        tokenizer_class=config.get("tokenizer_class"),
        chat_templates=_chat_templates(folder, config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        CheckpointError: the file cannot be read as a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; download or copy it again")
    return content


def _text(token: Any) -> str | None:
    """A token is written as its text, or as an object with the text under ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    return value if isinstance(value, bool) else None


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """``added_tokens.json`` first, so that the newer ``added_tokens_decoder`` wins where both name an id."""
    for content, token_id in read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, int):
            yield AddedToken(content, token_id, special=False)
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        yield _added_token(folder, token_id, token)


def _added_token(folder: Path, token_id: str, token: Any) -> AddedToken:
    content = _text(token)
    if content is None or not str(token_id).isdecimal():
        fault = f"added_tokens_decoder[{token_id!r}]={token!r} must map an id to an object with its content"
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {fault}; download or copy the file again")
    flags = token if isinstance(token, Mapping) else {}
    special, lstrip, rstrip = (bool(flags.get(name)) for name in ("special", "lstrip", "rstrip"))
    return AddedToken(content, int(token_id), special=special, lstrip=lstrip, rstrip=rstrip)


def _extra_specials(specials: Mapping[str, Any]) -> Iterator[str]:
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = specials.get(name) or ()
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
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int):
                found[name] = first
    return found


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates that transformers would find.

    ``chat_template.jinja`` and ``additional_chat_templates/`` come first, then ``tokenizer_config.json``, then the file
    in which processors keep theirs.
    """
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _read_template(path) for name, path in files.items() if path.is_file()}
    if found:
        return found
    for file, content in (("tokenizer_config.json", config), ("chat_template.json", None)):
        content = read_json(folder / file) if content is None else content
        if content.get("chat_template"):
            return _named_templates(folder / file, content["chat_template"])
    return {}


def _named_templates(path: Path, given: Any) -> dict[str, str]:
    """One template as a text, or several as a list of ``name`` and ``template`` or as an object."""
    named = {DEFAULT: given} if isinstance(given, str) else given
    if isinstance(given, list):
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, Mapping)}
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for item in named.items() for text in item):
        fault = f"chat_template={given!r:.60} must be a text, or a list of objects with name and template"
        raise CheckpointError(f"{path}: {fault}; download or copy the file again")
    return dict(named)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable as text ({error}); download or copy it again") from error
