"""Settings: checks, unknown names, LMDeploy's other names, YAML and JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxdeploy
from jaxdeploy import ChatTemplateConfig, EngineConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from jaxdeploy.api.arguments import OWNERS
from jaxdeploy.config import ProxyConfig, QuantConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import describe, read_yaml

V03_TURBOMIND = {
    "model_name": "m", "model_format": "hf", "tp": 1, "session_len": 64, "max_batch_size": 2,
    "cache_max_entry_count": 0.5, "cache_block_seq_len": 32, "quant_policy": 0, "rope_scaling_factor": 0.0,
    "use_logn_attn": False, "download_dir": "d", "revision": "r", "max_prefill_token_num": 64,
}  # fmt: skip
V03_PYTORCH = {
    "model_name": "m", "tp": 1, "session_len": 64, "max_batch_size": 2, "cache_max_entry_count": 0.5,
    "eviction_type": "recompute", "prefill_interval": 16, "block_size": 64, "num_cpu_blocks": 0, "num_gpu_blocks": 0,
    "adapters": None, "max_prefill_token_num": 4096, "thread_safe": False, "download_dir": None, "revision": None,
}  # fmt: skip
V03_GENERATION = {
    "n": 1, "max_new_tokens": 512, "top_p": 1.0, "top_k": 1, "temperature": 0.8, "repetition_penalty": 1.0,
    "ignore_eos": False, "random_seed": 1, "stop_words": ["x"], "bad_words": None, "min_new_tokens": None,
    "skip_special_tokens": True,
}  # fmt: skip


def make(cls: Any, **fields: Any) -> Any:
    return cls(**fields)


def test_one_class_under_three_names() -> None:
    assert TurbomindEngineConfig is EngineConfig
    assert PytorchEngineConfig is EngineConfig
    assert set(jaxdeploy.__all__) >= {"pipeline", "serve", "GenerationConfig", "ChatTemplateConfig", "Response"}


@pytest.mark.parametrize(
    ("cls", "fields"),
    [(EngineConfig, V03_TURBOMIND), (EngineConfig, V03_PYTORCH), (GenerationConfig, V03_GENERATION)],
)
def test_every_field_of_lmdeploy_0_3_is_taken(cls: Any, fields: dict[str, Any]) -> None:
    cls(**fields)


def test_a_field_without_meaning_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    config = make(EngineConfig, thread_safe=False, eviction_type="copy")
    assert [record.name for record in caplog.records] == ["jaxdeploy", "jaxdeploy"]
    assert "eviction_type='copy' has no meaning here" in caplog.text
    caplog.clear()
    dataclasses.replace(config, tp=2)
    assert not caplog.records


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="sesion_len=8 is not a setting of EngineConfig; the nearest one is session_len"
    ):
        make(EngineConfig, sesion_len=8)
    with pytest.raises(ConfigError, match="the nearest one is temperature"):
        make(GenerationConfig, temprature=1)
    config: Any = GenerationConfig()
    with pytest.raises(ConfigError, match="the nearest one is top_k"):
        config.topk = 3


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (EngineConfig, "tp", 0),
        (EngineConfig, "tp", "two"),
        (EngineConfig, "tp", 1.5),
        (EngineConfig, "tp", True),
        (EngineConfig, "tp", None),
        (EngineConfig, "dtype", "float8"),
        (EngineConfig, "cache_max_entry_count", 1.5),
        (EngineConfig, "cache_max_entry_count", 0),
        (EngineConfig, "cache_max_entry_count", float("nan")),
        (EngineConfig, "block_size", 48),
        (EngineConfig, "quant_policy", 3),
        (EngineConfig, "model_format", "fp8"),
        (EngineConfig, "load_format", "gguf"),
        (EngineConfig, "rope_scaling_factor", -1.0),
        (EngineConfig, "warmup", "yes"),
        (EngineConfig, "adapters", {"a": ""}),
        (EngineConfig, "adapters", {"": "b"}),
        (EngineConfig, "adapters", ["a=b", "a=c"]),
        (EngineConfig, "adapters", 5),
        (EngineConfig, "max_loras", 0),
        (GenerationConfig, "n", 0),
        (GenerationConfig, "max_new_tokens", 0),
        (GenerationConfig, "top_p", 1.1),
        (GenerationConfig, "top_k", -1),
        (GenerationConfig, "temperature", -0.1),
        (GenerationConfig, "temperature", float("inf")),
        (GenerationConfig, "repetition_penalty", 0.0),
        (GenerationConfig, "presence_penalty", 3),
        (GenerationConfig, "stop_words", [1]),
        (GenerationConfig, "output_logits", "all"),
        (ChatTemplateConfig, "capability", "sing"),
    ],
)
def test_a_bad_value_is_one_line_that_says_what_to_do(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}={value!r} ")
    assert "; " in text
    assert "\n" not in text


class Unprintable:
    """It cannot be shown or compared."""

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError


ODD_VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 2**31, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), 1j),
    *("", "x", "20", "\ud83d", "\0", "a\nb", "x" * 100_000, b"x", Path("/x"), int, object(), Unprintable()),
    *([], [None], [1], ["x"], [[[]]], [Unprintable()], [10**400], (), (1, 2), {1, 2}, range(5), iter([1])),
    *({}, {"a": 1}, {None: None}, {"a": Unprintable()}, {"a": 10**400}, {5: float("nan")}, {"x": {"y": 1}}),
    *(np.float32(0.5), np.int64(5), np.bool_(True), np.float64("nan"), np.array([1, 2]), np.array(5), np.zeros((2, 2))),
    *(Decimal("0.5"), Fraction(1, 2), Fraction(10**400, 3)),
]


@pytest.mark.parametrize("cls", [*OWNERS, GenerationConfig, ProxyConfig, QuantConfig])
def test_any_value_is_kept_or_refused_in_one_line(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A value of a field becomes one of Python's own types, or raises nothing but ``ConfigError``."""
    caplog.set_level(logging.ERROR)
    lines: list[str] = []
    for name, described in describe(cls).items():
        for value in ODD_VALUES:
            try:
                kept = getattr(cls(**{name: value}), name)
            except ConfigError as error:
                lines.append(str(error))
                continue
            if described.about.live and not described.is_list and kept is not None and described.kind is not dict:
                assert type(kept) in (bool, int, float, str), name
    assert all(line.isprintable() and len(line) < 1100 for line in lines)


def test_numbers_of_numpy_are_numbers() -> None:
    config: Any = GenerationConfig
    config = config(max_new_tokens=np.int64(5), temperature=np.float32(0.5), stop_token_ids=[np.int32(7)])
    assert (config.max_new_tokens, config.temperature, config.stop_token_ids) == (5, 0.5, [7])


@pytest.mark.parametrize("cls", [ChatTemplateConfig, EngineConfig])
def test_self_is_no_setting(cls: Any) -> None:
    with pytest.raises(ConfigError, match="self=1 is not a setting of"):
        cls(self=1)


def test_other_names() -> None:
    config = make(EngineConfig, cache_block_seq_len=32, num_gpu_blocks=100)
    assert (config.block_size, config.num_blocks) == (32, 100)
    assert make(EngineConfig, num_gpu_blocks=0).num_blocks is None
    with pytest.raises(ConfigError, match="is another name of block_size"):
        make(EngineConfig, cache_block_seq_len=32, block_size=64)
    assert dataclasses.replace(config, block_size=16).block_size == 16
    words = {"none": 0, "int8": 8, "int4": 4}
    assert {word: make(EngineConfig, quant_policy=word).quant_policy for word in words} == words


def test_values_are_checked_when_they_are_assigned() -> None:
    config = GenerationConfig()
    config.top_k = 5
    config.stop_words = ["a"]
    assert config == GenerationConfig(top_k=5, stop_words=["a"])
    with pytest.raises(ConfigError, match="top_k=-1"):
        config.top_k = -1


def test_one_text_stands_for_a_list_of_one() -> None:
    assert make(GenerationConfig, stop_words="end").stop_words == ["end"]
    assert make(GenerationConfig, stop_token_ids=(1, 2)).stop_token_ids == [1, 2]


def test_cache_share_or_blocks() -> None:
    assert EngineConfig(cache_max_entry_count=1.0).cache_max_entry_count == 1.0
    assert EngineConfig(cache_max_entry_count=300).cache_max_entry_count == 300


def test_every_setting_is_described() -> None:
    for cls in (EngineConfig, GenerationConfig, ChatTemplateConfig):
        assert all(described.about.help for described in describe(cls).values())


def test_chat_template_json_round_trip(tmp_path: Path) -> None:
    config = ChatTemplateConfig(model_name="mine", system="<s>", stop_words=["</s>"])
    path = tmp_path / "template.json"
    assert json.loads(config.to_json(path)) == {"model_name": "mine", "system": "<s>", "stop_words": ["</s>"]}
    assert ChatTemplateConfig.from_json(path) == config
    assert ChatTemplateConfig.from_json(config.to_json()) == config


def test_chat_template_json_faults(tmp_path: Path) -> None:
    for text in ("[1]", "{"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="mend it"):
            ChatTemplateConfig.from_json(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="the nearest one is system"):
        ChatTemplateConfig.from_json('{"sistem": "x"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplateConfig.from_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        ChatTemplateConfig().to_json(tmp_path / "no/such/folder.json")


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text("session-len: 64\ntop_k: 3\n")
    assert read_yaml(str(path)) == {"session_len": 64, "top_k": 3}
    for text in ("- a\n", "a: [", "\x00"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="mend the file"):
            read_yaml(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"a": Path("/x/y")}, {"a": "/x/y"}),
        ("/x/y/", {"y": "/x/y/"}),
        (["a=/x=1", "/x/y"], {"a": "/x=1", "y": "/x/y"}),
        (None, None),
    ],
)
def test_forms_of_adapters(given: Any, kept: Any) -> None:
    assert EngineConfig(adapters=given).adapters == kept
