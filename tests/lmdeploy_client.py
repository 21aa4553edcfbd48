"""What LMDeploy's ``APIClient`` sends and how it reads the answers, as of its versions 0.3, 0.9 and 0.16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2

CHAT: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 1.0,
    "n": 1,
    "max_tokens": None,
    "stop": None,
    "stream": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "user": None,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "skip_special_tokens": True,
}
LATER_CHAT: dict[str, Any] = {
    **CHAT,
    "logprobs": False,
    "top_logprobs": 0,
    "spaces_between_special_tokens": True,
    "top_k": 40,
    "min_new_tokens": None,
    "min_p": 0.0,
    "logit_bias": None,
    "stream_options": None,
}
COMPLETION: dict[str, Any] = {
    "suffix": None,
    "temperature": 0.7,
    "n": 1,
    "max_tokens": 16,
    "stream": False,
    "stop": None,
    "top_p": 1.0,
    "top_k": 40,
    "user": None,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "skip_special_tokens": True,
}
LATER_COMPLETION: dict[str, Any] = {**COMPLETION, "spaces_between_special_tokens": True, "stream_options": None}
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "0.3": {"chat": {**CHAT, "session_id": -1}, "completion": {**COMPLETION, "session_id": -1}},
    "0.9": {"chat": LATER_CHAT, "completion": LATER_COMPLETION},
    "0.16": {
        "chat": {**LATER_CHAT, "max_completion_tokens": None},
        "completion": {**LATER_COMPLETION, "max_completion_tokens": 16},
    },
}
"""Version → what its methods send unless told otherwise."""

INTERACTIVE: dict[str, Any] = {
    "session_id": -1,
    "interactive_mode": False,
    "stream": False,
    "stop": None,
    "request_output_len": None,
    "top_p": 0.8,
    "top_k": 40,
    "temperature": 0.8,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "adapter_name": None,
}


class LMDeployClient:
    """The client of one ``version``: every argument that a method has is sent, the others in ``kwargs``."""

    def __init__(self, url: str, version: str) -> None:
        self._http = httpx2.Client(base_url=url, timeout=60)
        self._arguments = ARGUMENTS[version]
        image = {} if version == "0.3" else {"image_url": None}
        self._interactive = {**INTERACTIVE, **image}

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def models(self) -> list[str]:
        """Names."""
        return [model["id"] for model in self._http.get("/v1/models").json()["data"]]

    def encode(self, text: str | list[str], *, do_preprocess: bool = False) -> tuple[Any, Any]:
        """Token ids, and how many."""
        asked = {"input": text, "do_preprocess": do_preprocess, "add_bos": True}
        found = self._http.post("/v1/encode", json=asked).json()
        return found["input_ids"], found["length"]

    def chat(self, messages: Any, **given: Any) -> Iterator[Any]:
        """Chunks, or the one reply."""
        return self._said("/v1/chat/completions", self._arguments["chat"], given, messages=messages)

    def complete(self, prompt: Any, **given: Any) -> Iterator[Any]:
        """Chunks, or the one reply."""
        return self._said("/v1/completions", self._arguments["completion"], given, prompt=prompt)

    def interact(self, prompt: Any, **given: Any) -> Iterator[Any]:
        """Pieces of a reply in a session."""
        return self._said("/v1/chat/interactive", self._interactive, given, prompt=prompt)

    def end_session(self, session_id: int) -> list[Any]:
        """What the server answers."""
        return list(self.interact("", session_id=session_id, request_output_len=0, interactive_mode=False))

    def _said(self, path: str, defaults: dict[str, Any], given: dict[str, Any], **what: Any) -> Iterator[Any]:
        named = {name: value for name, value in given.items() if name in defaults or name == "model"}
        others = {name: value for name, value in given.items() if name not in named}
        model = {} if path.endswith("interactive") else {"model": self.models()[0]}
        body = {**model, **what, **defaults, **named, "kwargs": others}
        with self._http.stream("POST", path, json=body) as response:
            for line in b"".join(response.iter_bytes()).split(b"\n"):
                text = line.decode()
                if text and text != "data: [DONE]":
                    yield json.loads(text.removeprefix("data: "))
