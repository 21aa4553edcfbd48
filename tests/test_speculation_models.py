"""Real models write the same with guesses as without, whoever guesses; and settings that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxdeploy import EngineConfig, GenerationConfig, Pipeline, Response, SpeculativeConfig, pipeline
from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.engine.speculation.gate import Gate
from jaxdeploy.errors import ConfigError
from tests.tiny_models import live_arrays

STORIES = "stories260K"
SIZES: dict[str, Any] = {
    "warmup": False,
    "max_batch_size": 16,
    "session_len": 256,
    "block_size": 16,
    "max_prefill_token_num": 512,
    "num_tokens_per_iter": 512,
}
PROMPTS = (
    "What is 7 + 8?",
    "My name is Anna. What is my name?",
    "Repeat after me: blue cat. Repeat after me: blue cat.",
    "Which flags are there?",
    "Once upon a time there was a dog. Once upon a time",
    "Say 1 2 3 4 1 2 3 4 1 2 3",
    "Hello",
    "How do I quantise a model?",
)
KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.2},
    {"temperature": 0.9, "random_seed": 7, "top_k": 40},
    {"stop_words": ["the", "is"], "ignore_eos": True},
    {"logprobs": 2, "frequency_penalty": 0.3},
    {"response_format": {"type": "regex_schema", "regex_schema": "(one |two |three ){4,9}"}},
    {"bad_words": ["Use", " a"], "min_new_tokens": 12},
]


@pytest.fixture(params=["bundled", STORIES])
def model(request: pytest.FixtureRequest) -> Path:
    """The bundled model, or the other real one."""
    if request.param == "bundled":
        return Path(bundled_model())
    shared: Path = request.getfixturevalue("shared")
    return shared / "assets/models" / STORIES


@pytest.fixture
def shallow(model: Path, tmp_path: Path) -> Path:
    """The same model without its last layers: it is often right."""
    folder = tmp_path / "shallow"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"] - 2
    put_json(folder / "config.json", {**config, "num_hidden_layers": layers})
    files = open_checkpoint(model, None)
    gone = tuple(f"model.layers.{index}." for index in range(layers, config["num_hidden_layers"]))
    put_tensors(folder / "model.safetensors", {name: files[name].read() for name in files if not name.startswith(gone)})
    return folder


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess in every step, however long it takes."""
    monkeypatch.setattr(Gate, "is_open", lambda gate, batch: True)


def answer(pipe: Pipeline) -> tuple[list[Response], list[Response]]:
    """Sixteen requests of all kinds together, and some of them alone."""
    configs = [
        GenerationConfig(**{"do_sample": "temperature" in kind, "max_new_tokens": 40, **kind})
        for kind in (KINDS[n % len(KINDS)] for n in range(16))
    ]
    prompts: list[Any] = [PROMPTS[n * 5 % len(PROMPTS)] for n in range(16)]
    together = pipe(prompts, configs)
    alone = [pipe(prompts[n], configs[n]) for n in range(8)]
    assert isinstance(together, list)
    return together, [reply for reply in alone if isinstance(reply, Response)]


def texts(replies: list[Response]) -> list[Any]:
    """All that must not change."""
    return [(reply.text, reply.token_ids, reply.finish_reason, _ids(reply.logprobs)) for reply in replies]


def _ids(logprobs: list[dict[int, float]] | None) -> list[list[int]] | None:
    return None if logprobs is None else [list(token) for token in logprobs]


@pytest.mark.slow
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("quant_policy", [0, 8])
def test_replies_are_the_same(model: Path, shallow: Path, quant_policy: int) -> None:
    sizes = {**SIZES, "quant_policy": quant_policy}
    with pipeline(str(model), **sizes) as pipe:
        together, alone = answer(pipe)
    assert texts(together[:8]) == texts(alone)
    methods: dict[str, dict[str, Any]] = {
        "ngram": {"speculative_method": "ngram"},
        "draft": {"speculative_model": str(shallow)},
    }
    for method, settings in methods.items():
        with pipeline(str(model), **sizes, **settings) as pipe:
            both = answer(pipe)
        assert texts(both[0]) == texts(together), method
        assert texts(both[1]) == texts(alone), method
        assert sum(reply.speculation.accepted for reply in both[0]) > 0, method


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"speculative_method": "draft"}, "needs a speculative_model"),
        ({"speculative_method": "ngram", "speculative_model": "x"}, "leave one out"),
        ({"speculative_method": "guess"}, "is not one of ngram, draft"),
        ({"speculative_method": "ngram", "num_speculative_tokens": 17}, "must lie between 1 and 16"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        pipeline(str(bundled_model()), **SIZES, **settings)


def test_a_model_with_other_tokens_cannot_guess(shared: Path) -> None:
    with pytest.raises(ConfigError, match="other tokens"):
        pipeline(str(bundled_model()), **SIZES, speculative_model=str(shared / "assets/models" / STORIES))


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_all_memory_is_given_back(method: str) -> None:
    model = str(bundled_model())
    named: dict[str, Any] = {"speculative_model": model} if method == "draft" else {}
    before = live_arrays()
    with pipeline(model, **SIZES, speculative_method=method, **named):
        assert live_arrays() > before
    assert live_arrays() == before


def test_lmdeploys_names() -> None:
    config = EngineConfig(speculative_algorithm="ngram", speculative_num_draft_tokens=5)
    assert (config.speculative_method, config.num_speculative_tokens) == ("ngram", 5)
    asked = SpeculativeConfig(method="draft", num_speculative_tokens=2)
    with pytest.raises(ConfigError, match="needs a speculative_model"):
        pipeline(str(bundled_model()), **SIZES, speculative_config=asked)
