"""Precedence request > generation_config.json > greedy, and the translation of texts into token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.config import GenerationConfig
from jaxdeploy.generation.resolved import bad_token_sequences, eos_token_ids, resolve
from jaxdeploy.tokenizer import Tokenizer


class Letters:
    """A vocabulary of letters, with ``<end>`` as one special token and ``##`` as one ordinary token."""

    eos_token_id: int | None = 2
    special_ids = frozenset({2, 3})

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        whole = {"<end>": 3, "##": 4}
        return [whole[text]] if text in whole else [ord(letter) for letter in text]


def resolved(config: GenerationConfig | None = None, **defaults: Any) -> Any:
    return resolve(config, defaults, Letters(), eos_token_ids={2}).sampling


def test_greedy_unless_asked() -> None:
    assert resolved().greedy
    assert resolved(temperature=0.6, top_p=0.9).greedy, "generation_config.json samples only with do_sample"


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p"])
def test_any_sampling_field_samples(field: str) -> None:
    value: Any = 5 if field == "top_k" else 0.5
    sampling = resolved(GenerationConfig(**{field: value}))
    assert not sampling.greedy
    assert getattr(sampling, field) == value


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(temperature=0, top_p=0.5),
        GenerationConfig(top_k=1, temperature=1.0),
        GenerationConfig(do_sample=False, temperature=0.8),
        GenerationConfig(top_p=0),
        GenerationConfig(do_sample=True, temperature=0.0),
    ],
)
def test_greedy_wins(config: GenerationConfig) -> None:
    assert resolved(config, do_sample=True, temperature=0.7).greedy


def test_gaps_come_from_the_checkpoint_then_from_constants() -> None:
    sampling = resolved(GenerationConfig(do_sample=True, top_p=0.5), temperature=0.7, top_p=0.9)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.5, 50, 0.0)
    assert resolved(GenerationConfig(top_p=0.5)).temperature == 1.0


def test_checkpoint_may_ask_for_sampling() -> None:
    sampling = resolved(None, do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.1, max_new_tokens=9)
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.7, 20, 1.1)
    assert sampling.max_new_tokens == 9
    assert resolved(None, temperature=None).max_new_tokens == 512


def test_seed_is_fresh_or_as_given() -> None:
    assert len({resolved().seed for _ in range(8)}) > 1
    assert resolved(GenerationConfig(random_seed=5)).seed == 5
    seeds = [s.seed for s in resolve(GenerationConfig(random_seed=5, n=3), {}, Letters()).alternatives()]
    assert seeds == [5, 6, 7]


def test_eos_is_the_union() -> None:
    configs: list[dict[str, Any]] = [{"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {"eos_token_id": None}, {}]
    assert eos_token_ids(Letters(), *configs) == {2, 7, 8, 9}


def test_stops_are_ids_only_where_that_is_safe() -> None:
    config = GenerationConfig(stop_words=["<end>", "##", "Q:"], stop_token_ids=[11])
    result = resolve(config, {}, Letters(), eos_token_ids={2}, template_stops=["##", "<|im"])
    assert result.sampling.stop_token_ids == {2, 3, 4, 11}
    assert result.text.stop_words == ("Q:", "<|im")
    alone = resolve(config, {}, Letters(), eos_token_ids={2})
    assert "##" in alone.text.stop_words, "an ordinary token of the user's may hide inside a longer one"


def test_ignore_eos_keeps_the_users_stops() -> None:
    config = GenerationConfig(ignore_eos=True, stop_words=["Q:"], stop_token_ids=[11])
    result = resolve(config, {}, Letters(), eos_token_ids={2}, template_stops=["<end>", "<|im"])
    assert result.sampling.stop_token_ids == {11}
    assert result.text.stop_words == ("Q:",)


def test_bad_words_are_met_in_every_position() -> None:
    config = GenerationConfig(bad_words=["no"], bad_token_ids=[9])
    sequences = resolved(config).bad_token_sequences
    assert set(sequences) == {(110, 111), (32, 110, 111), (9,)}


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_bad_words_of_real_tokenizers(shared: Path, name: str) -> None:
    tokenizer = Tokenizer.load(shared / "assets/tokenizers" / name)
    sequences = bad_token_sequences(["dog"], tokenizer)
    for text in ("A dog", "(dog", "dog", "\ndog"):
        ids = tokenizer.encode(text, add_bos=False)
        assert any(tuple(ids[-len(sequence) :]) == sequence for sequence in sequences), text


def test_text_switches() -> None:
    config = GenerationConfig(
        skip_special_tokens=False, spaces_between_special_tokens=False, include_stop_str_in_output=True
    )
    result = resolve(config, {}, Letters())
    assert not result.text.skip_special_tokens
    assert not result.text.spaces_between_special_tokens
    assert result.text.include_stop
