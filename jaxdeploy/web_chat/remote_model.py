"""The model that the web chat talks with: OpenAI's API, asynchronously. Many replies stream side by side."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx2

from jaxdeploy.api.client import (
    ApiClient,
    base_url,
    does_not_answer,
    event_in,
    key_header,
    raise_unless_well,
    sampling_fields,
)
from jaxdeploy.config import GenerationConfig


class RemoteModel:
    """The first model of the server at ``url``.

    Raises ``ServerError`` if it cannot be reached, ``ConfigError`` for a URL that is none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        found = ApiClient(url, api_key)
        found.close()
        self.name = found.model
        self.url = base_url(url)
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            headers=key_header(api_key),
            timeout=httpx2.Timeout(None, connect=10),
            limits=httpx2.Limits(max_connections=None),
        )

    async def events(
        self, messages: Sequence[Mapping[str, str]], gen_config: GenerationConfig, user: str
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a reply as they come; to close it ends the reply on the server. ``user``: who asks.

        Raises ``RequestError`` for what the server refuses, ``ServerError`` if it fails.
        """
        asked = {
            "model": self.name,
            "messages": messages,
            "user": user,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling_fields(gen_config),
        }
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=asked) as response:
                if response.status_code != 200:
                    await response.aread()
                raise_unless_well(response)
                async for line in response.aiter_lines():
                    if event := event_in(line):
                        yield event
        except httpx2.TransportError as error:
            raise does_not_answer(self.url, error) from None

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()
