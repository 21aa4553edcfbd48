"""What a caller may give as prompts, and the token ids of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxdeploy.errors import RequestError
from jaxdeploy.generation.prompt import prompt_ids

if TYPE_CHECKING:
    from jaxdeploy.chat_template import ChatTemplate
    from jaxdeploy.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[Message] | Mapping[str, Sequence[int]]"
Prompts: TypeAlias = "Prompt | Sequence[Prompt]"

_IMAGE_ADDRESS = re.compile(r"(https?://\S+|data:image/\S*|file://\S+|\S+\.(png|jpe?g|webp|gif|bmp))$", re.IGNORECASE)
_FORMS = "give a text, a list of messages, {'prompt_token_ids': [...]}, or a list of these"


def as_list(prompts: Any) -> tuple[list[Prompt], bool]:
    """The prompts one by one, and whether a single one was given. Raises ``RequestError`` for other things."""
    if isinstance(prompts, str | Mapping) or _is_conversation(prompts):
        return [prompts], True
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"prompts={prompts!r:.60} is no prompt; {_FORMS}")
    _refuse_images(prompts)
    return list(prompts), False


def encode(
    prompt: Prompt, tokenizer: Tokenizer, template: ChatTemplate, *, do_preprocess: bool, **ending: bool | None
) -> tuple[int, ...]:
    """Token ids of one prompt.

    A text is what the user says, put into the chat template unless ``do_preprocess`` is False; ids stay as they are.
    ``ending`` is how the text of messages ends, as ``ChatTemplate.render`` has it.

    Raises:
        RequestError: the prompt has none of the forms, breaks a rule of messages, or has no token at all.
    """
    return prompt_ids(_encode(prompt, tokenizer, template, do_preprocess, ending), tokenizer.bos_token_id, prompt)


def _encode(
    prompt: Prompt, tokenizer: Tokenizer, template: ChatTemplate, do_preprocess: bool, ending: dict[str, bool | None]
) -> tuple[int, ...]:
    if isinstance(prompt, Mapping):
        return _given_ids(prompt)
    if isinstance(prompt, str) and not do_preprocess:
        return tuple(template.encode_text(prompt, tokenizer))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
    return tuple(template.encode(messages, tokenizer, **ending))


def _given_ids(prompt: Mapping[str, Any]) -> tuple[int, ...]:
    if _is_message(prompt):
        raise RequestError(f"prompt={dict(prompt)!r:.60} is one message; put it into a list")
    ids = prompt.get("prompt_token_ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(_is_id(token_id) for token_id in ids):
        raise RequestError(f"prompt={dict(prompt)!r:.60} holds no list of token ids in 'prompt_token_ids'; {_FORMS}")
    return tuple(int(token_id) for token_id in ids)


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_conversation(prompts: Any) -> bool:
    return isinstance(prompts, list | tuple) and bool(prompts) and all(_is_message(item) for item in prompts)


def _is_message(item: Any) -> bool:
    """Whether a message is meant. The rules of messages come later: one without a role is told so."""
    return isinstance(item, Mapping) and bool({"role", "content"} & item.keys()) and "prompt_token_ids" not in item


def _messages(prompt: Any) -> Sequence[Message]:
    if isinstance(prompt, tuple):
        _refuse_images(prompt)
    if not _is_conversation(prompt):
        raise RequestError(f"prompt={prompt!r:.60} is no list of messages with a 'role' each; {_FORMS}")
    return prompt  # type: ignore[no-any-return]


def _refuse_images(prompts: Sequence[Any]) -> None:
    """Raise ``RequestError`` for LMDeploy's ``(text, image)``: it would be read as two prompts."""
    if not isinstance(prompts, tuple) or len(prompts) < 2 or not isinstance(prompts[0], str):
        return
    for index, item in enumerate(prompts[1:], 1):
        images = item if isinstance(item, list) else [item]
        if any(_is_image(image) for image in images):
            kind = f"{item!r:.60}" if isinstance(item, str) else type(item).__name__
            raise RequestError(f"prompts[{index}]={kind} is no text, and this model reads text only; leave images out")


def _is_image(item: Any) -> bool:
    """Whether it is an image, its address, or another thing that is no prompt."""
    if isinstance(item, str):
        return _IMAGE_ADDRESS.match(item) is not None
    return not isinstance(item, Mapping | list | tuple)
