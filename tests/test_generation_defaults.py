"""Values of ``generation_config.json`` obey the rules of requests, and are checked when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.checkpoint.writing import put_json
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.generation.defaults import FIELDS, checked_defaults, read_generation_defaults
from jaxdeploy.generation.resolved import resolve
from tests.test_generation_config import Letters

VALUES: tuple[Any, ...] = (-1, 0, 1, 20.0, 0.5, 1e9, 2**31, 10**400, float("nan"), float("inf"), True, "20", [1], {})


def test_whole_floats_are_whole_numbers_and_null_is_absent() -> None:
    found = checked_defaults(
        {"top_k": 20.0, "max_new_tokens": 9.0, "top_p": None, "do_sample": True, "pad_token_id": 0}
    )
    assert found == {"top_k": 20, "max_new_tokens": 9, "do_sample": True}
    assert type(found["top_k"]) is int
    assert resolve(None, found, Letters()).sampling.top_k == 20


@pytest.mark.parametrize("name", FIELDS)
def test_a_default_is_accepted_exactly_where_a_request_is(name: str) -> None:
    for value in VALUES:
        try:
            wanted = getattr(GenerationConfig(**{name: value}), name)
        except ConfigError:
            with pytest.raises(CheckpointError, match=f"^generation_config.json: {name}=[^\n]*$"):
                checked_defaults({name: value})
            continue
        assert checked_defaults({name: value}) == {name: wanted}


@pytest.mark.parametrize("value", ["2", True, 2.5, float("nan"), -2, 2**31, [1, None], {"a": 1}, [[1]]])
def test_ends_that_are_no_ids(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^generation_config.json: eos_token_id=[^\n]* must be a token id or a"):
        checked_defaults({"eos_token_id": value})


def test_ends_that_are_ids() -> None:
    assert checked_defaults({"eos_token_id": [2.0, 7, -1]}) == {"eos_token_id": [2, 7]}
    assert checked_defaults({"eos_token_id": -1}) == {}


def test_the_models_own_stop_strings_end_a_reply() -> None:
    defaults = checked_defaults({"stop_strings": ["ab", "<end>"]})
    assert resolve(None, defaults, Letters()).text.stop_words == ("ab",)
    assert resolve(None, defaults, Letters()).sampling.stop_token_ids == {3}
    assert resolve(GenerationConfig(ignore_eos=True), defaults, Letters()).text.stop_words == ()


def test_a_wrong_stop_string_is_named_as_in_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"^generation_config.json: stop_strings=\[1\] must be text"):
        checked_defaults({"stop_strings": [1]})


def test_every_fault_is_listed(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}
    put_json(tmp_path / "generation_config.json", {"top_k": "many", "temperature": -1, "eos_token_id": "x"})
    with pytest.raises(CheckpointError) as caught:
        read_generation_defaults(tmp_path)
    for name in ("top_k", "temperature", "eos_token_id"):
        assert str(caught.value).count(f"\n  generation_config.json: {name}=") == 1
