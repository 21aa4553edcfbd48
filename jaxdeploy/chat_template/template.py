"""The chat template of a model: the checkpoint's own, or one chosen by name, file or pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxdeploy.chat_template.builtin import BASE, BY_ARCHITECTURE, CHAT_TEMPLATES, find_builtin
from jaxdeploy.chat_template.conversation import Message, check_messages, ending, text_of
from jaxdeploy.chat_template.jinja import JinjaTemplate
from jaxdeploy.chat_template.pieces import BuiltinTemplate
from jaxdeploy.chat_template.variables import check_variables
from jaxdeploy.config import ChatTemplateConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.files.stored import is_file
from jaxdeploy.settings import nearest
from jaxdeploy.tokenizer import Tokenizer
from jaxdeploy.tokenizer.settings import DEFAULT

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
    jinja: JinjaTemplate | None
    meta_instruction: str | None
    stop_words: tuple[str, ...]
    capability: str
    special_tokens: Mapping[str, str]

    @classmethod
    def resolve(cls, spec: ChatTemplateConfig | str | None, tokenizer: Tokenizer, architecture: str) -> ChatTemplate:
        """Find the template.

        ``spec`` None: the checkpoint's Jinja template, else the family's built-in one, else plain text. A text: the
        name of one of the checkpoint's templates or of a built-in one, or the path of LMDeploy's JSON form or of a
        Jinja file. A config: the same by ``model_name``, with its other fields in place of the template's pieces; a new
        name with pieces is a new template.

        Raises:
            ConfigError: the name is unknown, or the template cannot do what ``capability`` asks for.
            CheckpointError: the Jinja source is not valid.
        """
        if isinstance(spec, str) and spec in tokenizer.chat_templates:
            return cls._from_jinja(spec, {DEFAULT: tokenizer.chat_templates[spec]}, tokenizer)
        source = _read_spec(spec) if isinstance(spec, str) else spec or ChatTemplateConfig()
        if isinstance(source, Path):
            return cls._from_jinja(source.name, {DEFAULT: _read(source)}, tokenizer)
        return cls._own(source, tokenizer, architecture)._with(source, tokenizer)

    @property
    def source(self) -> str | None:
        """The Jinja source, of all templates that the checkpoint names; None for a built-in template."""
        return None if self.jinja is None else self.jinja.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation. A reply that comes last is continued, unless the two flags say otherwise.

        Args:
            messages: as OpenAI has them; text only.
            add_generation_prompt: end with the header of a new reply.
            continue_final_message: end inside the last message, which is the assistant's.
            tools: the functions that the model may call.
            kwargs: more variables for a Jinja template, as ``chat_template_kwargs`` of a request has them.

        Raises:
            RequestError: a message breaks a rule, the flags contradict each other, or the template refuses the messages
                or has no place for some of them or for ``tools``, or does not read a variable in ``kwargs``.
        """
        chat = check_messages(messages, self.jinja.roles if self.jinja is not None else ())
        how = ending(chat, add_generation_prompt, continue_final_message)
        if kwargs:
            check_variables(kwargs, self._reads(tools), self.name)
        if self.capability != "chat":
            text = "".join(text_of(message) for message in chat)
            return _infill(text) if self.capability == "infilling" else text
        if self.pieces is not None:
            if tools:
                raise RequestError(f"tools= has no place in chat template {self.name!r}; leave tools out")
            return self.pieces.render(chat, how)
        assert self.jinja is not None
        variables = {"documents": None, **self.special_tokens, **kwargs}
        return self.jinja.render(self._with_system(chat), tools, how, variables)

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
        if name is None and tokenizer.chat_templates and not changed:
            return cls._from_jinja("checkpoint", tokenizer.chat_templates, tokenizer)
        name = name or ("base" if changed else BY_ARCHITECTURE.get(architecture, "base"))
        pieces = find_builtin(name)
        if pieces is None and not changed:
            raise ConfigError(_unknown(name))
        return cls._from_pieces(name, pieces or BASE, tokenizer)

    @classmethod
    def _from_jinja(cls, name: str, sources: Mapping[str, str], tokenizer: Tokenizer) -> ChatTemplate:
        jinja = JinjaTemplate(name, sources)
        return cls(name, None, jinja, None, _stop_words(jinja.source, tokenizer), "chat", tokenizer.special_tokens)

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
        system = self.meta_instruction if config.meta_instruction is None else config.meta_instruction or None
        stops = self.stop_words if config.stop_words is None else tuple(config.stop_words)
        if capability == "infilling" and config.stop_words is None:
            stops = (*stops, "<EOT>")
        pieces = self.pieces and replace(self.pieces, **_pieces(config), meta_instruction=system)
        return replace(self, pieces=pieces, meta_instruction=system, stop_words=stops, capability=capability)

    def _reads(self, tools: Sequence[Mapping[str, Any]] | None) -> frozenset[str]:
        """Names of the variables that a rendering depends on."""
        if self.jinja is None or self.capability != "chat":
            return frozenset()
        return self.jinja.reads(tools)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """Put the default system prompt first where the messages bring none."""
        if not self.meta_instruction or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.meta_instruction}, *messages]


def _read_spec(spec: str) -> ChatTemplateConfig | Path:
    """A known name comes before a file of that name."""
    if find_builtin(spec) is not None:
        return ChatTemplateConfig(model_name=spec)
    path = Path(spec)
    if is_file(path):
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
    near = nearest(name.lower(), CHAT_TEMPLATES)
    hint = f"{near}; " if near else ""
    return f"chat_template={name!r} is no known name; {hint}`jaxdeploy list` shows all, and a file's path works too"


def _pieces(config: ChatTemplateConfig) -> dict[str, Any]:
    return {piece: value for piece in PIECES if (value := getattr(config, piece)) is not None}


def _stop_words(source: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    ends = next((ends for sign, ends in TURN_ENDS.items() if sign in source), ())
    return tuple(end for end in ends if tokenizer.token_to_id(end) is not None)


def _infill(text: str) -> str:
    """CodeLlama's prompt for the text that belongs between a prefix and a suffix."""
    prefix, found, suffix = text.partition(FILL)
    if not found or FILL in suffix:
        raise RequestError(f"prompt must hold {FILL} once with capability=infilling; mark the gap with it")
    return f"<PRE> {prefix} <SUF>{suffix} <MID>"
