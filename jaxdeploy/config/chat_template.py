"""Settings of the chat template."""

from __future__ import annotations

import json
from pathlib import Path

from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.files.atomic import check_replaceable, is_json, put_text
from jaxdeploy.files.stored import read_text, shown
from jaxdeploy.settings import ignored, setting, settings


@settings
class ChatTemplateConfig:
    """Which chat template, and pieces that replace parts of it.

    ``None`` leaves a piece as it is. ``model_name`` is a name that ``jaxdeploy list`` shows, ``None`` the checkpoint's
    own template. One turn reads ``system + meta_instruction + eosys + user + text + eoh + assistant + reply + eoa +
    separator``.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    model_name: str | None = setting(None, "name of a built-in chat template (jaxdeploy list)")
    system: str | None = setting(None, "before the system prompt")
    meta_instruction: str | None = setting(None, "the system prompt; empty: none, not even the template's default")
    eosys: str | None = setting(None, "after the system prompt")
    user: str | None = setting(None, "before what the user says")
    eoh: str | None = setting(None, "after what the user says")
    assistant: str | None = setting(None, "before a reply")
    eoa: str | None = setting(None, "after a reply")
    tool: str | None = setting(None, "before a tool's result")
    eotool: str | None = setting(None, "after a tool's result")
    separator: str | None = setting(None, "between two turns")
    capability: str | None = setting(
        None,
        "what a text prompt is: a chat message, or raw text to complete",
        choices=("chat", "completion", "infilling", "python"),
    )
    stop_words: list[str] | None = setting(None, "texts that end a reply")

    model_path: str | None = ignored("the template comes from the model that is loaded")

    @classmethod
    def from_json(cls, file_or_string: str | Path) -> ChatTemplateConfig:
        """Read LMDeploy's JSON form, from a file or from a text that holds it. Raises ``ConfigError``."""
        text = str(file_or_string)
        if not text.lstrip().startswith("{"):
            text = _read_text(Path(text))
        try:
            pieces = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"chat_template={shown(str(file_or_string))} is not JSON ({error}); mend it") from None
        if not isinstance(pieces, dict):
            raise ConfigError(f"chat_template={shown(str(file_or_string))} must hold a JSON object; mend it")
        return cls(**pieces)

    def to_json(self, file_path: str | Path | None = None) -> str:
        """The pieces that are set, as JSON; written to ``file_path`` too if it is given. Raises ``ConfigError``."""
        pieces = {name: value for name, value in vars(self).items() if value is not None}
        text = json.dumps(pieces, ensure_ascii=False, indent=2)
        if file_path is not None:
            _write_text(Path(file_path), text + "\n")
        return text


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"chat_template={str(path)!r} cannot be read ({error}); name a JSON file") from None


def _write_text(path: Path, text: str) -> None:
    try:
        check_replaceable(path, is_json(dict))
        put_text(path, text)
    except OSError as error:
        raise ConfigError(f"file_path={str(path)!r} cannot be written ({error.strerror}); name another file") from None
