"""From the settings of a request to those of the engine: defaults are filled in, texts become token ids.

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
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.files.stored import shown
from jaxdeploy.generation.defaults import token_ids
from jaxdeploy.grammar.response_format import grammar_of
from jaxdeploy.messages import SamplingParams, TextOptions
from jaxdeploy.unicode_text import well_formed, well_formed_values

DRAW_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
MAX_NEW_TOKENS = 512
SETTING_DEFAULTS = {
    **DRAW_DEFAULTS,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_new_tokens": MAX_NEW_TOKENS,
    "min_new_tokens": 0,
}
_SEEDS = 2**32
_BAD = frozenset({"bad_words", "bad_token_ids"})
_DRAW = itemgetter(*DRAW_DEFAULTS)


class Vocabulary(Protocol):
    """What is needed of a tokenizer here."""

    eos_token_id: int | None
    special_ids: frozenset[int]

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...


Settings: TypeAlias = "GenerationConfig | Mapping[str, Any] | None"
"""A config, or the fields of one that are set. The values of a mapping have been checked."""


@dataclass(frozen=True)
class ResolvedGeneration:
    """Settings with defaults filled in.

    sampling: how tokens are chosen.
    text: how tokens become text.
    n: number of alternative replies.
    """

    sampling: SamplingParams
    text: TextOptions = field(default_factory=TextOptions)
    n: int = 1

    def alternatives(self) -> list[SamplingParams]:
        """Return ``n`` samplings that differ in their seed."""
        seed = self.sampling.seed
        others = [replace(self.sampling, seed=(seed + index) % _SEEDS) for index in range(1, self.n)]
        return [self.sampling, *others]


def resolve(
    settings: Settings,
    defaults: Mapping[str, Any],
    tokenizer: Vocabulary,
    *,
    eos_token_ids: Iterable[int] = (),
    template_stops: Sequence[str] = (),
    to_grammar: Callable[[Mapping[str, Any]], str | None] = grammar_of,
    encode_word: Callable[[str], Sequence[int]] | None = None,
) -> ResolvedGeneration:
    """Fill in defaults and translate texts to token ids.

    Stop tokens and stop words that the model sets do not count under ``ignore_eos``. Those of ``settings`` do.

    Args:
        settings: fields of the request. Without ``random_seed`` the seed is random.
        defaults: result of ``read_generation_defaults``.
        tokenizer: the tokenizer of the model.
        eos_token_ids: result of ``eos_token_ids``.
        template_stops: words with which the chat template ends a reply.
        to_grammar: checks and translates ``response_format``.
        encode_word: returns the ids of a stop word, possibly from a cache; default: ``tokenizer.encode``.

    Raises:
        RequestError: ``response_format`` cannot be followed, or does not go with another setting.
    """
    given = _set_fields(settings)
    merged = {**SETTING_DEFAULTS, **defaults, **given}
    ignore_eos = bool(given.get("ignore_eos"))
    model_ids = frozenset() if ignore_eos else frozenset(eos_token_ids)
    model_stops = () if ignore_eos else (*template_stops, *defaults.get("stop_words", ()))
    stop_ids, stop_words = _split_stops(
        given.get("stop_words", ()),
        model_stops,
        tokenizer.special_ids,
        encode_word or partial(tokenizer.encode, add_bos=False),
    )
    return ResolvedGeneration(
        sampling=SamplingParams(
            **_draw(given, merged),
            repetition_penalty=float(merged["repetition_penalty"]),
            presence_penalty=float(merged["presence_penalty"]),
            frequency_penalty=float(merged["frequency_penalty"]),
            max_new_tokens=merged["max_new_tokens"],
            min_new_tokens=merged["min_new_tokens"],
            seed=given["random_seed"] % _SEEDS if "random_seed" in given else secrets.randbelow(_SEEDS),
            stop_token_ids=model_ids.union(stop_ids, given.get("stop_token_ids", ())),
            bad_token_sequences=() if given.keys().isdisjoint(_BAD) else _bad_sequences(given, tokenizer),
            logprobs=given.get("logprobs"),
            prompt_logprobs=given.get("prompt_logprobs"),
            logit_bias=_biases(given["logit_bias"]) if given.get("logit_bias") else (),
            grammar=_grammar(given, to_grammar) if "response_format" in given else None,
            num_speculative_tokens=given.get("num_speculative_tokens"),
        ),
        text=TextOptions(
            stop_words=stop_words,
            skip_special_tokens=given.get("skip_special_tokens", True),
            spaces_between_special_tokens=given.get("spaces_between_special_tokens", True),
            include_stop=given.get("include_stop_str_in_output", False),
        ),
        n=given.get("n", 1),
    )


def eos_token_ids(tokenizer: Vocabulary, *configs: Mapping[str, Any]) -> frozenset[int]:
    """Every id that ends a reply: the tokenizer's and each ``eos_token_id`` (one or a list) of the JSON files.

    Raises ``CheckpointError``: an ``eos_token_id`` that is no id and no list of ids.
    """
    named = [token for config in configs for token in token_ids(config, "config.json")]
    return frozenset(named if tokenizer.eos_token_id is None else [tokenizer.eos_token_id, *named])


def bad_token_sequences(words: Iterable[str], tokenizer: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """Every way in which the tokenizer may begin each word: at the start of a text, after a space, inside a line."""
    found = {}
    for text in (variant for word in words for variant in (word.lstrip(), " " + word.lstrip())):
        found[tuple(tokenizer.encode(text, add_bos=False))] = True
        found[_after_newline(text, tokenizer)] = True
    return tuple(ids for ids in found if ids)


def _set_fields(settings: Settings) -> Mapping[str, Any]:
    """Return the fields that are not ``None``."""
    if isinstance(settings, GenerationConfig):
        return {name: value for name, value in vars(settings).items() if value is not None}
    return settings or {}


def _bad_sequences(given: Mapping[str, Any], tokenizer: Vocabulary) -> tuple[tuple[int, ...], ...]:
    of_words = bad_token_sequences(given["bad_words"], tokenizer) if given.get("bad_words") else ()
    of_ids = tuple((token_id,) for token_id in given["bad_token_ids"]) if given.get("bad_token_ids") else ()
    return of_words + of_ids


def _biases(given: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Raises ``ConfigError`` for what are no numbers."""
    try:
        return tuple((int(token), float(value)) for token, value in given.items())
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"logit_bias={shown(given)} must map token ids to numbers; correct it") from None


def _grammar(given: Mapping[str, Any], to_grammar: Callable[[Mapping[str, Any]], str | None]) -> str | None:
    """Return the grammar of the reply. Raises ``RequestError`` if it is none, or does not go with other settings."""
    if given.get("ignore_eos") or given.get("min_new_tokens"):
        raise RequestError("response_format says when a reply ends; leave ignore_eos and min_new_tokens out")
    return to_grammar(well_formed_values(given["response_format"]))


def _draw(given: Mapping[str, Any], merged: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a random draw; none for greedy decoding. ``merged`` has the defaults too."""
    asked = not given.keys().isdisjoint(DRAW_DEFAULTS) or bool(merged.get("do_sample"))
    if not given.get("do_sample", asked):
        return {}
    greedy = merged["temperature"] == 0 or merged["top_k"] == 1 or merged["top_p"] == 0
    return {} if greedy else dict(zip(DRAW_DEFAULTS, _DRAW(merged), strict=True))


def _split_stops(
    asked: Sequence[str],
    of_template: Sequence[str],
    special_ids: frozenset[int],
    encode: Callable[[str], Sequence[int]],
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Ids and texts. A user's word is an id only where it is a special token: others may hide inside longer tokens."""
    ids, words = set(), {}
    for word in map(well_formed, filter(None, (*asked, *of_template))):
        encoded = encode(word)
        if len(encoded) == 1 and (word in of_template or encoded[0] in special_ids):
            ids.add(encoded[0])
        else:
            words[word] = True
    return frozenset(ids), tuple(words)


def _after_newline(text: str, tokenizer: Vocabulary) -> tuple[int, ...]:
    """Return the ids of ``text`` without a prefix that the tokenizer adds to whole texts; nothing if there is doubt."""
    line, both = tokenizer.encode("\n", add_bos=False), tokenizer.encode("\n" + text, add_bos=False)
    return tuple(both[len(line) :]) if both[: len(line)] == line else ()
