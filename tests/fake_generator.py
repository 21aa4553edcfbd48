"""A generator without a model: it says the prompt again, one character a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxdeploy.api.pipeline import Pipeline
from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.config import ChatTemplateConfig, EngineConfig
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.errors import ContextLengthError
from jaxdeploy.messages import FinishReason, Request, TextOutput, TokenLogprob
from jaxdeploy.tokenizer import Tokenizer

BOS, EOS = 1, 2


class Characters:
    """A tokenizer whose tokens are characters."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS
    special_ids = frozenset({BOS, EOS})
    special_tokens: Mapping[str, str] = {}
    prefix_ids = (BOS,)
    chat_template = None
    chat_templates: Mapping[str, str] = {}
    vocab_size = 0x110000

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        return [BOS] * add_bos + [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in ids if token_id > EOS)

    def token_to_id(self, token: str) -> int | None:
        return None


class FakeGenerator(Generator):
    """Echoes. ``aborted`` names the requests that were dropped, ``submitted`` all that came."""

    eos_token_ids = frozenset({EOS})
    session_len = 256

    def __init__(
        self,
        template: ChatTemplateConfig | str | None = None,
        defaults: Mapping[str, Any] | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.tokenizer = cast(Tokenizer, Characters())
        self.template = ChatTemplate.resolve(template, self.tokenizer, "LlamaForCausalLM")
        self.generation_defaults = defaults or {}
        self.config = config
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.closed = False
        self._left: dict[str, list[int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def submit(self, request: Request) -> None:
        ids = request.prompt_token_ids
        if len(ids) >= self.session_len:
            raise ContextLengthError(
                f"prompt has {len(ids)} tokens, session_len={self.session_len}; shorten the prompt"
            )
        self.submitted.append(request)
        self._left[request.request_id] = [token_id for token_id in ids if token_id > EOS] or [ord("?")]

    def step(self) -> list[TextOutput]:
        return [self._one(request) for request in self.submitted if request.request_id in self._left]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._left.pop(request_id, None)

    def close(self) -> None:
        self.closed = True

    def _one(self, request: Request) -> TextOutput:
        name, sampling = request.request_id, request.sampling
        token_id = self._left[name].pop(0)
        said = len(request.prompt_token_ids) - 1 - len(self._left[name])
        finish = FinishReason.LENGTH if said >= sampling.max_new_tokens else None
        if finish is None and not self._left[name]:
            finish = FinishReason.STOP
        if finish is not None:
            del self._left[name]
        logprobs = (TokenLogprob(token_id, math.log(0.5), ((7, math.log(0.25)),)),) if sampling.logprobs else ()
        return TextOutput(name, chr(token_id), (token_id,), logprobs, finish)


def fake_pipeline(**kwargs: Any) -> tuple[Pipeline, FakeGenerator]:
    """A pipeline that echoes, and its generator."""
    generator = FakeGenerator(**kwargs)
    return Pipeline(generator), generator
