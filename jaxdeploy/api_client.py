"""A model behind a server, as far as a conversation in the terminal needs one: OpenAI's API, ours or another's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ConfigError, JaxdeployError, RequestError
from jaxdeploy.messages import FinishReason
from jaxdeploy.prompts import Prompt
from jaxdeploy.response import Response, Session

OTHER_NAMES = {"max_new_tokens": "max_tokens", "stop_words": "stop", "random_seed": "seed"}
SAME_NAMES = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty", "ignore_eos", "bad_words", "min_new_tokens", "skip_special_tokens"),
)
"""Settings of a generation and the fields of a request that they are; the second line is beyond OpenAI's API."""


class ServerError(JaxdeployError):
    """The server cannot be reached, or failed."""

    exit_code = 1


class ApiClient:
    """Answers with the model that the server at ``url`` calls ``model``, its first one if none is named.

    Raises ``ServerError`` if it cannot be reached, ``ConfigError`` for a URL or key that it refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        try:
            import httpx2
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is missing; pip install 'jaxdeploy[serve]'") from None
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url={url!r} is no address; give one like http://127.0.0.1:23333")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx2.Client(base_url=self._url, headers=headers, timeout=httpx2.Timeout(None, connect=10))
        self._names = itertools.count()
        self._stopped: set[int] = set()
        try:
            self.model = model or self._first_model()
        except JaxdeployError:
            self._http.close()
            raise

    def session(self) -> Session:
        """A new conversation; the server is told all of it each time."""
        return Session(next(self._names))

    def stop_session(self, session: Session | int) -> None:
        """End the reply that runs for a session, from another thread or a signal handler."""
        self._stopped.add(session if isinstance(session, int) else session.session_id)

    def stream_infer(self, prompts: Prompt, gen_config: GenerationConfig, *, session_id: int) -> Iterator[Response]:
        """The reply as it comes. Raises ``RequestError`` for what the server refuses, ``ServerError`` if it fails."""
        path, asked = self._request(prompts, gen_config)
        length = 0
        for event in self._events(path, asked):
            stopped = session_id in self._stopped
            for choice in event["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                ended = choice.get("finish_reason")
                length += bool(text)
                reason = FinishReason.ABORT if stopped else FinishReason(ended) if ended in REASONS else None
                yield Response(text, length, 0, session_id, reason, [0] * bool(text))
            if stopped:
                self._stopped.discard(session_id)
                return

    def close(self) -> None:
        """End the connection."""
        self._http.close()

    def _first_model(self) -> str:
        models = self._checked(self._send("GET", "/v1/models")).json()["data"]
        if not models:
            raise ServerError(f"url={self._url!r} serves no model; start one there")
        name: str = models[0]["id"]
        return name

    def _request(self, prompt: Prompt, gen_config: GenerationConfig) -> tuple[str, dict[str, Any]]:
        names = OTHER_NAMES | {name: name for name in SAME_NAMES}
        fields = {api: getattr(gen_config, name) for name, api in names.items()}
        given = {name: value for name, value in fields.items() if value is not None}
        asked = {"model": self.model, "stream": True, **given}
        if isinstance(prompt, str):
            return "/v1/completions", {"max_tokens": 512, **asked, "prompt": prompt}
        return "/v1/chat/completions", {**asked, "messages": prompt}

    def _events(self, path: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import httpx2

        try:
            with self._http.stream("POST", path, json=asked) as response:
                if response.status_code != 200:
                    response.read()
                self._checked(response)
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise ServerError(event["error"]["message"])
                        yield event
        except httpx2.TransportError as error:
            raise ServerError(f"url={self._url!r} does not answer ({error}); look whether it still runs") from None

    def _send(self, method: str, path: str) -> Any:
        import httpx2

        try:
            return self._http.request(method, path)
        except httpx2.TransportError as error:
            raise ServerError(f"url={self._url!r} cannot be reached ({error}); is a server running there?") from None

    def _checked(self, response: Any) -> Any:
        """``response`` if it is well; else the server's own words are raised."""
        if response.status_code == 200:
            return response
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{response.request.url} answers {response.status_code}; is it a server of OpenAI's API?"
        raise (RequestError if response.status_code in (400, 404) else ServerError)(message)


REASONS = frozenset(reason.value for reason in FinishReason)
