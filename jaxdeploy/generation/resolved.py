"""From what the user asked for to what the engine does: defaults filled in, texts turned into token ids.

A field counts from the first of these that sets it: the request, the checkpoint's ``generation_config.json``, the
values below. A reply is greedy if the request says ``do_sample`` False, if the temperature or ``top_p`` is 0, or if
``top_k`` is 1. Else it is drawn at random if the request says ``do_sample`` True or sets any of ``temperature``,
``top_p``, ``top_k`` and ``min_p``, or, where it does none of that, if ``generation_config.json`` has ``do_sample``
true. Else it is greedy. A draw takes the fields that the request leaves out from ``generation_config.json``, then
temperature 1.0, ``top_p`` 1.0, ``top_k`` 50 and ``min_p`` 0 (transformers' and LMDeploy's).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.generation.defaults import token_ids
from jaxdeploy.grammar.response_format import grammar_of
from jaxdeploy.messages import SamplingParams
from jaxdeploy.unicode_text import well_formed, well_formed_values

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
MAX_NEW_TOKENS = 512
_SEEDS = 2**32


class Vocabulary(Protocol):
    """What is needed of a tokenizer here."""

    eos_token_id: int | None
    special_ids: frozenset[int]

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...


@dataclass(frozen=True)
class ResolvedGeneration:
    """A generation config without gaps: what the engine wants in ids, and what happens to the text afterwards."""

    sampling: SamplingParams
    stop_words: tuple[str, ...] = ()
    n: int = 1
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop: bool = False

    def alternatives(self) -> list[SamplingParams]:
        """``n`` samplings that differ in their seed."""
        seed = self.sampling.seed
        return [replace(self.sampling, seed=(seed + index) % _SEEDS) for index in range(self.n)]


def resolve(
    config: GenerationConfig | None,
    defaults: Mapping[str, Any],
    tokenizer: Vocabulary,
    *,
    eos_token_ids: Iterable[int] = (),
    template_stops: Sequence[str] = (),
    to_grammar: Callable[[Mapping[str, Any]], str | None] = grammar_of,
) -> ResolvedGeneration:
    """Fill the gaps of ``config`` and translate its texts.

    ``defaults`` is what ``read_generation_defaults`` returned, ``eos_token_ids`` what ``eos_token_ids()`` found,
    ``template_stops`` the words with which the chat template ends a reply, ``to_grammar`` checks and translates
    ``response_format``. A request without ``random_seed`` gets a
    fresh one. Ends that the model sets, the template's among them, do not count under ``ignore_eos``; the user's do.
    """
    config = config or GenerationConfig()
    own_stops = frozenset() if config.ignore_eos else frozenset(eos_token_ids)
    turn_stops = () if config.ignore_eos else (*template_stops, *defaults.get("stop_words", ()))
    stop_ids, stop_words = _split_stops(config.stop_words or (), turn_stops, tokenizer)
    return ResolvedGeneration(
        sampling=replace(
            _sampling(config, defaults, own_stops | stop_ids | frozenset(config.stop_token_ids or ()), tokenizer),
            grammar=_grammar(config, to_grammar),
        ),
        stop_words=stop_words,
        n=config.n or 1,
        skip_special_tokens=config.skip_special_tokens is not False,
        spaces_between_special_tokens=config.spaces_between_special_tokens is not False,
        include_stop=bool(config.include_stop_str_in_output),
    )


def eos_token_ids(tokenizer: Vocabulary, *configs: Mapping[str, Any]) -> frozenset[int]:
    """Every id that ends a reply: the tokenizer's and each ``eos_token_id`` (one or a list) of the JSON files.

    Raises ``CheckpointError``: an ``eos_token_id`` that is no id and no list of ids.
    """
    named = [token for config in configs for token in token_ids(config, "config.json")]
    return frozenset(named if tokenizer.eos_token_id is None else [tokenizer.eos_token_id, *named])


def samples(config: GenerationConfig, defaults: Mapping[str, Any]) -> bool:
    """Whether tokens are drawn at random, before looking at temperature 0 and the like."""
    if config.do_sample is not None:
        return config.do_sample
    asked = any(getattr(config, name) is not None for name in SAMPLING_DEFAULTS)
    return asked or bool(defaults.get("do_sample"))


def bad_token_sequences(words: Iterable[str], tokenizer: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """Every way in which the tokenizer may begin each word: at the start of a text, after a space, inside a line."""
    found = {}
    for text in (variant for word in words for variant in (word.lstrip(), " " + word.lstrip())):
        found[tuple(tokenizer.encode(text, add_bos=False))] = True
        found[_after_newline(text, tokenizer)] = True
    return tuple(ids for ids in found if ids)


def _sampling(
    config: GenerationConfig, defaults: Mapping[str, Any], stop_ids: frozenset[int], tokenizer: Vocabulary
) -> SamplingParams:
    def value(name: str, fallback: Any) -> Any:
        return next((v for v in (getattr(config, name), defaults.get(name)) if v is not None), fallback)

    bad_ids = tuple((token_id,) for token_id in config.bad_token_ids or ())
    return SamplingParams(
        **_draw(config, defaults, value),
        repetition_penalty=float(value("repetition_penalty", 1.0)),
        presence_penalty=float(value("presence_penalty", 0.0)),
        frequency_penalty=float(value("frequency_penalty", 0.0)),
        seed=secrets.randbelow(_SEEDS) if config.random_seed is None else config.random_seed % _SEEDS,
        max_new_tokens=value("max_new_tokens", MAX_NEW_TOKENS),
        min_new_tokens=value("min_new_tokens", 0),
        stop_token_ids=stop_ids,
        bad_token_sequences=bad_token_sequences(config.bad_words or (), tokenizer) + bad_ids,
        logprobs=config.logprobs,
        prompt_logprobs=config.prompt_logprobs,
        logit_bias=_biases(config.logit_bias or {}),
        num_speculative_tokens=config.num_speculative_tokens,
    )


def _biases(given: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Raises ``ConfigError`` for what are no numbers."""
    try:
        return tuple((int(token), float(value)) for token, value in given.items())
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias={given!r:.60} must map token ids to numbers; correct it") from None


def _grammar(config: GenerationConfig, to_grammar: Callable[[Mapping[str, Any]], str | None]) -> str | None:
    """What the reply must follow. Raises ``RequestError`` for what cannot go with it, or is none."""
    if config.response_format is None:
        return None
    if config.ignore_eos or config.min_new_tokens:
        raise RequestError("response_format says when a reply ends; leave ignore_eos and min_new_tokens out")
    return to_grammar(well_formed_values(config.response_format))


def _draw(config: GenerationConfig, defaults: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """The fields of a draw; nothing, which is greedy, where none is wanted."""
    if not samples(config, defaults):
        return {}
    draw = {name: value(name, fallback) for name, fallback in SAMPLING_DEFAULTS.items()}
    greedy = draw["temperature"] == 0 or draw["top_k"] == 1 or draw["top_p"] == 0
    return {} if greedy else draw


def _split_stops(
    asked: Sequence[str], of_template: Sequence[str], tokenizer: Vocabulary
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Ids and texts. A user's word is an id only where it is a special token: others may hide inside longer tokens."""
    ids, words = set(), {}
    for word in map(well_formed, filter(None, (*asked, *of_template))):
        encoded = tokenizer.encode(word, add_bos=False)
        if len(encoded) == 1 and (word in of_template or encoded[0] in tokenizer.special_ids):
            ids.add(encoded[0])
        else:
            words[word] = True
    return frozenset(ids), tuple(words)


def _after_newline(text: str, tokenizer: Vocabulary) -> tuple[int, ...]:
    """The ids of ``text`` without what a tokenizer puts in front of a whole text; nothing where that cannot be told."""
    line, both = tokenizer.encode("\n", add_bos=False), tokenizer.encode("\n" + text, add_bos=False)
    return tuple(both[len(line) :]) if both[: len(line)] == line else ()
