"""A model behind a server, as far as a conversation in the terminal needs one: OpenAI's API, ours or another's."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdeploy.api.prompts import Prompt
from jaxdeploy.api.response import Response, Session
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ConfigError, ContextLengthError, JaxdeployError, RequestError
from jaxdeploy.files.stored import exists
from jaxdeploy.messages import FinishReason

OTHER_NAMES = {"max_new_tokens": "max_tokens", "stop_words": "stop", "random_seed": "seed"}
SAME_NAMES = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty", "ignore_eos", "bad_words", "min_new_tokens", "skip_special_tokens"),
)
"""Settings of a generation and the fields of a request that they are; the second line is beyond OpenAI's API."""


SCHEMES = ("http://", "https://")
HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}(/.*)?", re.ASCII)


class ServerError(JaxdeployError):
    """The server cannot be reached, or failed; ``status`` is the HTTP status it gave, ``retry_after`` in seconds."""

    exit_code = 1

    def __init__(self, message: str, status: int | None = None, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ApiClient:
    """Answers with the model that the server at ``url`` calls ``model``, its first one if none is named.

    Raises ``ServerError`` if it cannot be reached, ``ConfigError`` for a URL or key that it refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        try:
            import httpx2
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is missing; pip install 'jaxdeploy[serve]'") from None
        self._url = base_url(url)
        self._http = httpx2.Client(
            base_url=self._url, headers=key_header(api_key), timeout=httpx2.Timeout(None, connect=10)
        )
        self._names = itertools.count()
        self._stopped: set[int] = set()
        try:
            self.model = model or self._first_model()
        except JaxdeployError:
            self._http.close()
            raise

    @property
    def session_len(self) -> None:
        """Not reported by OpenAI's API."""

    def session(self) -> Session:
        """A new conversation; the server is told all of it each time."""
        return Session(next(self._names))

    def stop_session(self, session: Session | int) -> None:
        """End the reply that runs for a session, from another thread or a signal handler."""
        self._stopped.add(session if isinstance(session, int) else session.session_id)

    def stream_infer(self, prompts: Prompt, gen_config: GenerationConfig, *, session_id: int) -> Iterator[Response]:
        """Yield the reply as it arrives. Raises ``RequestError`` (the server refuses it) or ``ServerError``."""
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
        response = self._send("GET", "/v1/models")
        raise_unless_well(response)
        models = response.json()["data"]
        if not models:
            raise ServerError(f"url={self._url!r} serves no model; start one there")
        name: str = models[0]["id"]
        return name

    def _request(self, prompt: Prompt, gen_config: GenerationConfig) -> tuple[str, dict[str, Any]]:
        asked = {"model": self.model, "stream": True, **sampling_fields(gen_config)}
        if isinstance(prompt, str):
            return "/v1/completions", {"max_tokens": 512, **asked, "prompt": prompt}
        return "/v1/chat/completions", {**asked, "messages": prompt}

    def _events(self, path: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import httpx2

        try:
            with self._http.stream("POST", path, json=asked) as response:
                if response.status_code != 200:
                    response.read()
                raise_unless_well(response)
                for line in response.iter_lines():
                    if event := event_in(line):
                        yield event
        except httpx2.TransportError as error:
            raise does_not_answer(self._url, error) from None

    def _send(self, method: str, path: str) -> Any:
        import httpx2

        try:
            return self._http.request(method, path)
        except httpx2.TransportError as error:
            raise ServerError(f"url={self._url!r} cannot be reached ({error}); is a server running there?") from None


def is_url(text: str) -> bool:
    """Whether it is the address of a server; ``HOST:PORT`` is one too, unless a file has that name."""
    return text.startswith(SCHEMES) or (HOST_AND_PORT.fullmatch(text) is not None and not exists(Path(text)))


def base_url(url: str) -> str:
    """``url`` with its scheme, and without the version of the API. Raises ``ConfigError`` if it is none."""
    if not is_url(url):
        raise ConfigError(f"url={url!r} is no address; give one like http://127.0.0.1:23333")
    scheme = "" if url.startswith(SCHEMES) else "http://"
    return scheme + url.rstrip("/").removesuffix("/v1")


def key_header(api_key: str | None) -> dict[str, str]:
    """What shows ``api_key`` to a server. Raises ``ConfigError`` for an empty one."""
    if api_key is None:
        return {}
    if not api_key.strip():
        raise ConfigError("api_key is empty; give the key that the server asks for, or leave api_key out")
    return {"Authorization": f"Bearer {api_key}"}


def sampling_fields(gen_config: GenerationConfig) -> dict[str, Any]:
    """The fields of a request for what ``gen_config`` sets."""
    names = OTHER_NAMES | {name: name for name in SAME_NAMES}
    fields = {api: getattr(gen_config, name) for name, api in names.items()}
    if gen_config.do_sample is False:
        fields["temperature"] = 0.0
    return {name: value for name, value in fields.items() if value is not None}


def event_in(line: str) -> dict[str, Any] | None:
    """Return the event in a line of a stream. Raises ``ServerError`` if it reports a failure."""
    if not line.startswith("data: {"):
        return None
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ServerError(event["error"]["message"])
    return event


def does_not_answer(url: str, error: Exception) -> ServerError:
    """The error for a connection that broke."""
    return ServerError(f"url={url!r} does not answer ({error}); look whether it still runs")


def raise_unless_well(response: Any) -> None:
    """Raise what ``response`` complains of, in the server's own words."""
    if response.status_code == 200:
        return
    try:
        told = response.json()["error"]
        message, code = told["message"], told.get("code")
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answers {response.status_code}; is it a server of OpenAI's API?"
        code = None
    if code == "context_length_exceeded":
        raise ContextLengthError(message)
    if response.status_code in (400, 404):
        raise RequestError(message)
    raise ServerError(message, response.status_code, response.headers.get("Retry-After"))


REASONS = frozenset(reason.value for reason in FinishReason)
