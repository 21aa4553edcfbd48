"""The chat template of a model: the checkpoint's own, or one chosen by name, file or pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxdeploy.chat_template.builtin import BASE, BY_ARCHITECTURE, CHAT_TEMPLATES, find_builtin
from jaxdeploy.chat_template.pieces import BuiltinTemplate, plain_text
from jaxdeploy.chat_template.sandbox import CompiledTemplate
from jaxdeploy.config import ChatTemplateConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.tokenizer import Tokenizer

PIECES = ("system", "eosys", "user", "eoh", "assistant", "eoa", "tool", "eotool", "separator")
FILL = "<FILL>"
FILL_TOKENS = ("<PRE>", "▁<PRE>")
TURN_ENDS: dict[str, tuple[str, ...]] = {
    "<|return|>": ("<|return|>", "<|call|>"),
    "<|im_end|>": ("<|im_end|>", "<|action_end|>"),
    "<|eot_id|>": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "<|eot|>": ("<|eot|>",),
    "<end_of_turn>": ("<end_of_turn>",),
    "<|end|>": ("<|end|>", "<|endoftext|>"),
    "<|EOT|>": ("<|EOT|>",),
    "<eoa>": ("<eoa>",),
    "<|observation|>": ("<|user|>", "<|observation|>", "<|endoftext|>"),
}
"""A sign that a Jinja template writes → the tokens that end a reply in the family which uses it, as far as the
vocabulary has them. The first sign found counts: some checkpoints list only the end of the document as stop."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders messages. ``stop_words`` are texts that end a reply, beside the tokenizer's end token.

    ``capability``: ``chat``; ``completion`` and ``python`` pass a prompt on as it is; ``infilling`` puts the text
    around ``<FILL>`` into CodeLlama's order.
    """

    name: str
    pieces: BuiltinTemplate | None
    jinja: CompiledTemplate | None
    meta_instruction: str | None
    stop_words: tuple[str, ...]
    capability: str
    special_tokens: Mapping[str, str]

    @classmethod
    def resolve(cls, spec: ChatTemplateConfig | str | None, tokenizer: Tokenizer, architecture: str) -> ChatTemplate:
        """Find the template.

        ``spec`` None: the checkpoint's Jinja template, else the family's built-in one, else plain text. A text: the
        name of a built-in template, or the path of LMDeploy's JSON form or of a Jinja file. A config: the same by
        ``model_name``, with its other fields in place of the template's pieces; a new name with pieces is a new
        template.

        Raises:
            ConfigError: the name is unknown, or the template cannot do what ``capability`` asks for.
            CheckpointError: the Jinja source is not valid.
        """
        source = _read_spec(spec) if isinstance(spec, str) else spec or ChatTemplateConfig()
        if isinstance(source, Path):
            return cls._from_jinja(source.name, _read(source), tokenizer)
        return cls._own(source, tokenizer, architecture)._with(source, tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation; ``kwargs`` are more variables for a Jinja template.

        Raises:
            RequestError: the template refuses the messages, or has no place for ``tools``.
        """
        if self.capability != "chat":
            text = "".join(plain_text(message) for message in messages)
            return _infill(text) if self.capability == "infilling" else text
        if self.pieces is not None:
            if tools:
                raise RequestError(f"tools= has no place in chat template {self.name!r}; leave tools out")
            return self.pieces.render(messages, add_generation_prompt)
        assert self.jinja is not None
        variables = {"tools": tools, "documents": None, **self.special_tokens, **kwargs}
        chat = [_flattened(message) for message in self._with_system(messages)]
        return self.jinja.render({**variables, "messages": chat, "add_generation_prompt": add_generation_prompt})

    def encode(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **kwargs: Any) -> list[int]:
        """Token ids of ``render``'s text, begun as the tokenizer begins texts unless the template did that itself."""
        return self.encode_text(self.render(messages, **kwargs), tokenizer)

    def encode_text(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a rendered text; no end token, since the model is to go on."""
        begin = tokenizer.special_tokens.get("bos_token")
        begun = begin is not None and text.startswith(begin)
        return [*(() if begun else tokenizer.prefix_ids), *tokenizer.encode(text, add_bos=False)]

    @classmethod
    def _own(cls, config: ChatTemplateConfig, tokenizer: Tokenizer, architecture: str) -> ChatTemplate:
        """The template that the config starts from."""
        changed = [piece for piece in PIECES if getattr(config, piece) is not None]
        name = config.model_name
        if name is None and tokenizer.chat_template is not None and not changed:
            return cls._from_jinja("checkpoint", tokenizer.chat_template, tokenizer)
        name = name or ("base" if changed else BY_ARCHITECTURE.get(architecture, "base"))
        pieces = find_builtin(name)
        if pieces is None and not changed:
            raise ConfigError(_unknown(name))
        return cls._from_pieces(name, pieces or BASE, tokenizer)

    @classmethod
    def _from_jinja(cls, name: str, source: str, tokenizer: Tokenizer) -> ChatTemplate:
        render = CompiledTemplate(source)
        return cls(name, None, render, None, _stop_words(source, tokenizer), "chat", tokenizer.special_tokens)

    @classmethod
    def _from_pieces(cls, name: str, pieces: BuiltinTemplate, tokenizer: Tokenizer) -> ChatTemplate:
        system, stops, capability = pieces.meta_instruction, pieces.stop_words, pieces.capability
        return cls(name, pieces, None, system, stops, capability, tokenizer.special_tokens)

    def _with(self, config: ChatTemplateConfig, tokenizer: Tokenizer) -> ChatTemplate:
        """This template with the config's pieces in place of its own."""
        capability = config.capability or self.capability
        if capability == "infilling" and all(tokenizer.token_to_id(token) is None for token in FILL_TOKENS):
            fault = f"capability=infilling needs a model with the token {FILL_TOKENS[0]}"
            raise ConfigError(f"{fault}; use a CodeLlama, or capability=completion")
        system = self.meta_instruction if config.meta_instruction is None else config.meta_instruction
        stops = self.stop_words if config.stop_words is None else tuple(config.stop_words)
        if capability == "infilling" and config.stop_words is None:
            stops = (*stops, "<EOT>")
        pieces = self.pieces and replace(self.pieces, **_pieces(config), meta_instruction=system)
        return replace(self, pieces=pieces, meta_instruction=system, stop_words=stops, capability=capability)

    def _with_system(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Put the default system prompt first where the messages bring none."""
        given = bool(messages) and messages[0].get("role") in ("system", "developer")
        if not self.meta_instruction or given:
            return list(messages)
        return [{"role": "system", "content": self.meta_instruction}, *messages]


def _read_spec(spec: str) -> ChatTemplateConfig | Path:
    """A known name comes before a file of that name."""
    if find_builtin(spec) is not None:
        return ChatTemplateConfig(model_name=spec)
    path = Path(spec)
    if path.is_file():
        return ChatTemplateConfig.from_json(path) if path.suffix == ".json" else path
    if path.suffix in (".json", ".jinja"):
        raise ConfigError(f"chat_template={spec!r} does not exist; give a file or a name (jaxdeploy list shows them)")
    raise ConfigError(_unknown(spec))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={str(path)!r} cannot be read ({error}); name a Jinja file") from error


def _unknown(name: str) -> str:
    near = get_close_matches(name.lower(), CHAT_TEMPLATES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"chat_template={name!r} is no known name; {hint}`jaxdeploy list` shows them, and a file's path works too"


def _pieces(config: ChatTemplateConfig) -> dict[str, Any]:
    return {piece: value for piece in PIECES if (value := getattr(config, piece)) is not None}


def _stop_words(source: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    ends = next((ends for sign, ends in TURN_ENDS.items() if sign in source), ())
    return tuple(end for end in ends if tokenizer.token_to_id(end) is not None)


def _flattened(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Text given in parts, as OpenAI's clients may send it, in the one form that every template reads."""
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        return {**message, "content": plain_text(message)}
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _infill(text: str) -> str:
    """CodeLlama's prompt for the text that belongs between a prefix and a suffix."""
    prefix, found, suffix = text.partition(FILL)
    if not found or FILL in suffix:
        raise RequestError(f"prompt must hold {FILL} once with capability=infilling; mark the gap with it")
    return f"<PRE> {prefix} <SUF>{suffix} <MID>"
