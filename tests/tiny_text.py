"""Text around the tiny engines: a tokenizer whose tokens are pairs of letters, so that stop words cut through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.messages import Request, TextOutput
from jaxdeploy.tokenizer import Tokenizer
from tests.tiny_models import VOCAB, tiny_engine

LETTERS = "abcdefghij"


def piece(token_id: int) -> str:
    """The text of a token."""
    return LETTERS[token_id // 10] + LETTERS[token_id % 10]


def text_of(token_ids: Iterable[int]) -> str:
    """The text of many."""
    return "".join(map(piece, token_ids))


class Pairs:
    """Stands in for a tokenizer. ``asked`` are the settings of every detokenizer that was made."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    special_tokens: Mapping[str, str] = {}
    chat_template = None
    chat_templates: Mapping[str, str] = {}
    vocab_size = VOCAB

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def detokenizer(self, **asked: object) -> PairsDetokenizer:
        self.asked.append(asked)
        return PairsDetokenizer()

    def decode(self, ids: Sequence[int]) -> str:
        return text_of(ids)

    def token_to_id(self, token: str) -> int | None:
        return None


class PairsDetokenizer:
    """Shows a token's second letter only when the next one comes, as if it were an unfinished character."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._held + piece(token_id)
        self._held = text[-1]
        return text[:-1]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def tiny_generator(engine: EngineLike | None = None) -> Generator:
    """A generator over a tiny engine."""
    tokenizer = cast(Tokenizer, Pairs())
    template = ChatTemplate.resolve("base", tokenizer, "LlamaForCausalLM")
    return Generator(engine or tiny_engine(), tokenizer, template, {}, frozenset())


def active_blocks(generator: Generator) -> int:
    """KV blocks that somebody holds."""
    assert isinstance(generator.engine, Engine)
    return generator.engine.scheduler.blocks.active


def generate(generator: Generator, requests: Iterable[Request]) -> dict[str, list[TextOutput]]:
    """All outputs by request."""
    outputs: dict[str, list[TextOutput]] = {}
    for item in requests:
        generator.submit(item)
        outputs[item.request_id] = []
    while generator.has_work:
        for output in generator.step():
            outputs[output.request_id].append(output)
    return outputs


def joined(outputs: Iterable[TextOutput]) -> tuple[str, list[int]]:
    """Text and tokens of one request."""
    outputs = list(outputs)
    return "".join(output.text for output in outputs), [token for output in outputs for token in output.token_ids]
