"""Token ids of conversations and texts, computed in threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.errors import ContextLengthError, RequestError
from jaxdeploy.generation.prompt import prompt_ids
from jaxdeploy.server.text_threads import LONG, TextThreads

MAX_COUNTED = 2**20
"""Characters of a text that is only tokenised. A prompt can be longer."""

MAX_UTF8_BYTES = 4
"""Bytes of a character."""

TAIL = 16
"""Tokens at the end of a prompt in which a mark is searched."""


class PromptEncoder:
    """Encodes for the model of ``generator``."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._threads = TextThreads()

    async def chat_ids(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[int, ...]:
        """Return the token ids of a conversation. Raises ``RequestError``.

        ``variables`` are those of ``ChatTemplate.render``: tools, how the prompt ends, and those of the template.
        """
        return await self._prompt_ids(partial(self._generator.template.render, messages, **variables))

    async def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a raw text, with the token that texts begin with.

        Raises ``ContextLengthError`` if they are too many, ``RequestError`` if there are none.
        """
        ids = await self._prompt_ids(lambda: text)
        return prompt_ids(ids, self._generator.tokenizer.bos_token_id, "")

    async def ids_of(self, given: str | Sequence[int]) -> tuple[int, ...]:
        """Return the token ids of a raw text; token ids are returned unchanged."""
        return await self.text_ids(given) if isinstance(given, str) else tuple(given)

    async def count_chat_ids(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Return the token ids of a conversation, which may be longer than a prompt. Raises ``RequestError``."""
        text = await self._threads.run(partial(self._generator.template.render, messages, **variables))
        return await self._counted(text, partial(self._encoded, text))

    async def count_text_ids(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the token ids of a raw text, which may be longer than a prompt. Raises ``RequestError``."""
        return await self._counted(text, partial(self._generator.tokenizer.encode, text, add_bos=add_bos))

    def ends_with(self, ids: Sequence[int], mark: str) -> bool:
        """Return whether a prompt ends with ``mark``."""
        text = self._generator.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False)
        return text.rstrip().endswith(mark)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    async def _prompt_ids(self, make_text: Callable[[], str]) -> tuple[int, ...]:
        """Return the token ids of a text that ``make_text`` returns.

        One visit to a thread is enough for a short text. A long one is encoded by the threads for long texts.
        """
        found = await self._threads.run(partial(self._short_ids, make_text))
        if isinstance(found, str):
            found = await self._threads.run(partial(self._encoded, found), len(found))
        return tuple(found)

    def _short_ids(self, make_text: Callable[[], str]) -> list[int] | str:
        """Return the ids of a short text, or a long text. Raises ``ContextLengthError`` if they cannot fit."""
        text, session_len = make_text(), self._generator.session_len
        if MAX_UTF8_BYTES * len(text) >= session_len:
            least = self._generator.tokenizer.least_tokens(text)
            if least >= session_len:
                raise ContextLengthError(
                    f"prompt of at least {least} tokens must be shorter than session_len={session_len}; "
                    "shorten it, or start with a larger session_len"
                )
        return text if len(text) > LONG else self._encoded(text)

    async def _counted(self, text: str, encode: Callable[[], list[int]]) -> list[int]:
        if len(text) > MAX_COUNTED:
            least = await self._threads.run(partial(self._generator.tokenizer.least_tokens, text))
            if least >= self._generator.session_len:
                raise RequestError(
                    f"a text of {len(text)} characters is longer than a prompt and than {MAX_COUNTED} characters; "
                    "send it in parts"
                )
        return await self._threads.run(encode, len(text))

    def _encoded(self, text: str) -> list[int]:
        return self._generator.template.encode_text(text, self._generator.tokenizer)
