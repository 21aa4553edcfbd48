"""What a caller may give as prompts, and the token ids of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxdeploy.errors import RequestError

if TYPE_CHECKING:
    from jaxdeploy.chat_template import ChatTemplate
    from jaxdeploy.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[Message] | Mapping[str, Sequence[int]]"
Prompts: TypeAlias = "Prompt | Sequence[Prompt]"

ROLES = ("system", "developer", "user", "assistant", "tool")

_FORMS = "give a text, a list of messages, {'prompt_token_ids': [...]}, or a list of these"


def as_list(prompts: Any) -> tuple[list[Prompt], bool]:
    """The prompts one by one, and whether a single one was given. Raises ``RequestError`` for other things."""
    if isinstance(prompts, str | Mapping) or _is_conversation(prompts):
        return [prompts], True
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"prompts={prompts!r:.60} is no prompt; {_FORMS}")
    return list(prompts), False


def encode(prompt: Prompt, tokenizer: Tokenizer, template: ChatTemplate, *, do_preprocess: bool) -> tuple[int, ...]:
    """Token ids of one prompt.

    A text is what the user says, put into the chat template unless ``do_preprocess`` is False; ids stay as they are.

    Raises:
        RequestError: the prompt has none of the forms, or no token at all.
    """
    ids = _encode(prompt, tokenizer, template, do_preprocess)
    if not ids and tokenizer.bos_token_id is not None:
        return (tokenizer.bos_token_id,)
    if not ids:
        raise RequestError(f"prompt={prompt!r} has no tokens, and this model has no token to begin with; write some")
    return ids


def _encode(prompt: Prompt, tokenizer: Tokenizer, template: ChatTemplate, do_preprocess: bool) -> tuple[int, ...]:
    if isinstance(prompt, Mapping):
        return _given_ids(prompt)
    if isinstance(prompt, str) and not do_preprocess:
        return tuple(template.encode_text(prompt, tokenizer))
    if prompt == "" and template.capability == "chat":
        raise RequestError("prompt='' says nothing; write some text, or give do_preprocess=False to begin from nothing")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
    return tuple(template.encode(messages, tokenizer))


def _given_ids(prompt: Mapping[str, Any]) -> tuple[int, ...]:
    ids = prompt.get("prompt_token_ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(_is_id(token_id) for token_id in ids):
        raise RequestError(f"prompt={dict(prompt)!r:.60} holds no list of token ids in 'prompt_token_ids'; {_FORMS}")
    return tuple(int(token_id) for token_id in ids)


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_conversation(prompts: Any) -> bool:
    return isinstance(prompts, list | tuple) and bool(prompts) and all(_is_message(item) for item in prompts)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and not item.keys().isdisjoint({"role", "content", "tool_calls"})


def _messages(prompt: Any) -> Sequence[Message]:
    """The messages, checked by the rules that requests over HTTP obey."""
    if not _is_conversation(prompt):
        raise RequestError(f"prompt={prompt!r:.60} is no list of messages with a 'role' each; {_FORMS}")
    for index, message in enumerate(prompt):
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"messages[{index}].role={role!r:.60} is not one of {', '.join(ROLES)}; correct it")
        if message.get("content") is None and not message.get("tool_calls"):
            raise RequestError(f"messages[{index}].content is missing; give it a text")
    return prompt  # type: ignore[no-any-return]
