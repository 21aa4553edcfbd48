"""The token ids of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdeploy.errors import RequestError


def prompt_ids(ids: Sequence[int], bos_token_id: int | None, prompt: object) -> tuple[int, ...]:
    """Return ``ids``; for a prompt without tokens, the token that texts begin with.

    Raises ``RequestError`` that shows ``prompt`` if neither has a token.
    """
    if ids:
        return tuple(ids)
    if bos_token_id is None:
        raise RequestError(
            f"prompt={prompt!r} has no tokens, and this model has no token to begin with; write some text"
        )
    return (bos_token_id,)
