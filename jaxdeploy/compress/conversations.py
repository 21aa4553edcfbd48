"""Conversations of a calibration text, written as the model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.compress.rows import Message, Piece
from jaxdeploy.tokenizer import Tokenizer
from jaxdeploy.unicode_text import well_formed


class ConversationWriter:
    """Writes conversations with the chat template of a model, which is read when it is first needed.

    Calling it with messages returns the pieces of the text; only those of replies are ``scored``. It returns ``None``
    for a model without a template. Errors: ``RequestError`` if the template refuses the messages, ``CheckpointError``
    if the template is not valid.
    """

    def __init__(self, tokenizer: Tokenizer, architecture: str) -> None:
        self._tokenizer, self._architecture = tokenizer, architecture

    def __call__(self, messages: Sequence[Message]) -> list[Piece] | None:
        """See the class."""
        if self._template.name == "base":
            return None
        whole = self._text(messages)
        pieces: list[Piece] = []
        start = 0
        for place, message in enumerate(messages):
            if place and message["role"] == "assistant":
                begin, end = self._reply(messages, place)
                if not start <= begin <= end <= len(whole):
                    return [_piece(whole, scored=True)]
                pieces += [_piece(whole[start:begin], scored=False), _piece(whole[begin:end], scored=True)]
                start = end
        return [*pieces, _piece(whole[start:], scored=False)]

    def _reply(self, messages: Sequence[Message], place: int) -> tuple[int, int]:
        """Return the start and end of the reply at ``place`` in the whole text; (1, 0) if they are unknown.

        The white space after a reply belongs to the template, not to the reply.
        """
        prompt = self._text(messages[:place], generate=True)
        replied = self._text(messages[: place + 1]).rstrip()
        if self._text(messages).startswith(replied) and replied.startswith(prompt):
            return len(prompt), len(replied)
        return 1, 0

    def _text(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        return well_formed(self._template.render(messages, add_generation_prompt=generate))

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.resolve(None, self._tokenizer, self._architecture)


def _piece(text: str, *, scored: bool) -> Piece:
    return Piece(text, rendered=True, scored=scored)
